"""A channel: a TLS stream that carries frames, for code that sits in system calls."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from outboard.errors import NotAuthorisedError, UnreachableError
from outboard.linux import tcp
from outboard.wire import frames
from outboard.wire.codecs import Octets
from outboard.wire.frames import Decoder, Frame, Kind, Pages, PageSetPart
from outboard.wire.packed import Packed, decode_packed

_RECORD = 16384
"""The most that one TLS record holds."""
_SILENT_S = 10
"""After which a host that acknowledges nothing is taken to be gone."""
_STALLED_S = 30.0
"""How long a peer may take over one record that it has begun."""


class Channel:
    """One stream to another host.

    :param connection: connected and, if it is TLS, past its handshake; blocking. Taken over.
    :param peer_name: the host's name from its certificate.
    :param pages: how many pages the guest has that frames may speak of; 0 lets no page frame through.

    Synchronization: OpenSSL lets one thread use a connection at a time, so a lock is held while a record is read or
    written, and not while one is waited for: one thread may send while another receives. Several senders need a lock of
    their own. After a fork, one of the two processes uses it.
    """

    def __init__(self, connection: socket.socket, peer_name: str, pages: int = 0) -> None:
        self.socket = connection
        self.peer_name = peer_name
        self.bytes_sent = 0
        self.limit = pages
        self._decoder = Decoder()
        self._using = threading.Lock()
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tcp.give_up_silence(connection, _SILENT_S)
        # With a timeout the ssl module waits for the rest of a record in C, and gives up a peer that never sends it. A
        # blocking socket would be read again for ever: SO_RCVTIMEO reaches OpenSSL as "try again".
        connection.settimeout(_STALLED_S)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(connection, select.POLLOUT)
        self._alone = False

    def take_over(self) -> None:
        """Say that from now on a single thread of this process uses the channel, and that it may wait without end.

        A bulk stream is thousands of records a second, and to each of them belong a poll and a lock that it then saves.
        """
        self._alone = True
        self.socket.settimeout(None)

    def fileno(self) -> int:
        """Readable when bytes wait in the kernel; see :meth:`pending` for those that no longer do."""
        return self.socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        self.socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        at = 0
        try:
            while self._alone and at < len(view):
                at += self.socket.send(view[at : at + _RECORD])
            while at < len(view):
                # Wait for room without the lock: the peer may be waiting for us to read before it reads.
                self._writable.poll()
                with self._using:
                    at += self.socket.send(view[at : at + _RECORD])
        except (OSError, ValueError) as error:
            raise self._gone(error) from error
        self.bytes_sent += len(view)

    def send_small(self, data: bytearray) -> None:
        """Send what fits in one record and rarely has to wait for room.

        Only on a channel that a single thread uses.
        """
        try:
            sent = self.socket.send(data)
        except (OSError, ValueError) as error:
            raise self._gone(error) from error
        self.bytes_sent += sent
        if sent < len(data):
            self._send(memoryview(data)[sent:])

    def _gone(self, error: Exception) -> UnreachableError | NotAuthorisedError:
        if isinstance(error, ssl.SSLError) and "CERTIFICATE" in str(error.reason or "") + str(error):
            return NotAuthorisedError(f"{self.peer_name} did not accept this host's certificate: {error}")
        if isinstance(error, ssl.SSLError) and "ALERT" in str(error.reason or ""):
            return NotAuthorisedError(f"{self.peer_name} refused this host: {error.reason}")
        return UnreachableError(f"the connection to {self.peer_name} is gone: {error}")

    def send_message(self, payload: bytes) -> None:
        """Send a control message."""
        self._send(frames.header(Kind.MESSAGE, len(payload)) + payload)

    def send_stream(self, data: memoryview) -> None:
        """Send raw bytes; none end the stream."""
        self._send(frames.header(Kind.STREAM, len(data)) + bytes(data))

    def send_request(self, pages: list[int]) -> None:
        """Ask for pages; in as many frames as it takes."""
        for at in range(0, len(pages), frames.MAX_REQUEST):
            part = pages[at : at + frames.MAX_REQUEST]
            body = struct.pack(f"<{len(part)}Q", *part)
            self._send(frames.header(Kind.REQUEST, len(body)) + body)

    def send_pageset(self, name: int, first: int, bits: memoryview) -> None:
        """Send a part of a set of pages."""
        body = frames.pageset_head(name, first) + bytes(bits)
        self._send(frames.header(Kind.PAGESET, len(body)) + body)

    def send_pages(self, runs: list[tuple[int, int]], zero: NDArray[np.bool_], data: memoryview) -> int:
        """Send pages.

        :param runs: (first, count) each; :param zero: one bool a page; :param data: of those that are not zero.
        :return: bytes sent.
        """
        head = frames.pages_head(runs, zero)
        self._send(head)
        self._send(data)
        return len(head) + len(data)

    def send_pieces(self, pieces: Iterable[Octets]) -> int:
        """Send the pieces of one frame; how many bytes they were."""
        sent = 0
        for piece in pieces:
            self._send(piece)
            sent += len(piece)
        return sent

    def pending(self) -> bool:
        """Whether a frame has been received already, or part of one by the TLS engine: poll(2) would not tell."""
        return self._decoder.missing() <= 0 or bool(self._tls is not None and self._tls.pending())

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame; its payload is good until the next call.

        :param timeout: seconds to wait for all of it, and up to 30 more when the peer stops in the middle of a record;
            None waits for ever.
        :raise UnreachableError: the peer closed the connection, or time is up.
        :raise PeerError: what came is no frame.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        late = False
        while (frame := self._decoder.next()) is None:
            if self._alone and deadline is None:
                self._read_frame()
                continue
            if late:
                raise UnreachableError(f"{self.peer_name} did not send all of a frame in time")
            self._fill(deadline)
            late = deadline is not None and time.monotonic() > deadline
        return frame

    def _fill(self, deadline: float | None) -> None:
        if self._tls is None or not self._tls.pending():
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not self._readable.poll(left):
                raise UnreachableError(f"{self.peer_name} sent nothing in time")
        with self._using:
            self._read()

    def _read_frame(self) -> None:
        """Read on until what has begun is whole."""
        missing = self._decoder.missing()
        while missing > 0:
            missing -= self._read()

    def _read(self) -> int:
        try:
            size = self.socket.recv_into(self._decoder.get_buffer())
        except (OSError, ValueError) as error:
            raise self._gone(error) from error
        if not size:
            raise self._gone(ConnectionResetError(errno.ECONNRESET, "the other side closed it"))
        self._decoder.buffer_updated(size)
        return size

    def untaken(self) -> memoryview:
        """The bytes that have come and were not taken; at least one, which it waits for as long as the socket allows.

        Only on a channel that a single thread uses.
        """
        if not self._decoder.partial:
            self._read()
        return self._decoder.untaken()

    def address(self) -> int:
        """Where what :meth:`untaken` shows lies in this process."""
        return self._decoder.address()

    def take(self, size: int) -> None:
        """Take bytes that :meth:`untaken` has shown."""
        self._decoder.take(size)

    def pages(self, frame: Frame) -> Pages:
        """Read a PAGES frame.

        :raise PeerError: it does not add up, or names pages that the guest does not have.
        """
        return frames.decode_pages(frame.payload, self.limit)

    def packed(self, frame: Frame) -> Packed:
        """Read a PACKED frame; errors as :meth:`pages`, and content that cannot be unpacked."""
        return decode_packed(frame.payload, self.limit)

    def requested(self, frame: Frame) -> tuple[int, ...]:
        """Read a REQUEST frame; errors as :meth:`pages`."""
        return frames.decode_request(frame.payload, self.limit)

    def pageset(self, frame: Frame) -> PageSetPart:
        """Read a PAGESET frame; errors as :meth:`pages`."""
        return frames.decode_pageset(frame.payload, self.limit)
