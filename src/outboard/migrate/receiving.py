"""The destination's bulk receiver: a process that places what arrives and does nothing else."""

from __future__ import annotations

import socket

import numpy as np

from outboard.errors import PeerError
from outboard.migrate.messages import AllSent, Barrier, Resolve, Resolved, decode, encode
from outboard.migrate.unpacking import Unpacker
from outboard.pager.arriving import ArrivingMemory
from outboard.stores.disk import DiskStore
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind, Pages


class BulkReceiver:
    """Places the pages of the bulk stream.

    :param faults: the fault server's command socket: it is told of pages that somebody waited for.
    :param disks: the images of the VM that may be referred to.
    :param link: to the engine: the payloads of Barrier and AllSent, once all before them has been placed.
    """

    def __init__(
        self,
        memory: ArrivingMemory,
        channel: Channel,
        faults: socket.socket,
        link: socket.socket,
        disks: DiskStore | None = None,
    ) -> None:
        self._memory = memory
        self._channel = channel
        self._faults = faults
        self._link = link
        self._unpacker = Unpacker(memory, disks)
        channel.take_over()

    def serve(self) -> None:
        """Receive until AllSent.

        :raise UnreachableError: the stream ended before.
        :raise PeerError: the peer broke the protocol.
        """
        while True:
            frame = self._channel.receive()
            if frame.kind is Kind.PAGES:
                self._place(self._channel.pages(frame))
                continue
            if frame.kind is Kind.PACKED:
                self._place(self._unpacker.pages(self._channel.packed(frame)))
                continue
            if frame.kind is not Kind.MESSAGE:
                raise PeerError(f"a {frame.kind.name} frame on the bulk stream")
            payload = bytes(frame.payload)
            message = decode(payload)
            if isinstance(message, Resolve):
                self._channel.send_request(self._unpacker.refused)
                read_ns = self._unpacker.read_ns
                self._unpacker.refused, self._unpacker.read_ns = [], 0
                self._channel.send_message(encode(Resolved(read_ns)))
                continue
            if not isinstance(message, (Barrier, AllSent)):
                raise PeerError(f"a {type(message).__name__} message on the bulk stream")
            self._link.send(payload)
            if isinstance(message, AllSent):
                return

    def _place(self, pages: Pages) -> None:
        if not pages.runs:
            return
        runs, content = np.array(pages.runs, dtype=np.int64), np.frombuffer(pages.data, dtype=np.uint8)
        waited = self._memory.place(runs, pages.zero, content)
        if waited.size:
            self._faults.send(waited.astype("<u8").tobytes())
