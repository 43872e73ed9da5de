"""Mutual TLS 1.3 between the hosts of a cluster: who may speak is whoever holds a certificate of the cluster's CA.

A host is known by the name in its certificate, never by its address. A host's identity is a directory with ``key.pem``,
``cert.pem`` and ``ca.pem``; see :mod:`outboard.wire.pki`.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import select
import socket
import ssl
import threading
from pathlib import Path

from outboard.errors import KernelError, NotAuthorisedError, NotFoundError, UnreachableError, UsageError
from outboard.wire.channel import Channel

_HANDSHAKE_S = 5.0
_HANDSHAKES = 32
"""At most so many at a time: more callers than that wait in the kernel's queue."""
_RETRY_S = 0.1
"""How long no more callers are accepted after accept(2) has failed, as it does while no descriptor is free."""


@functools.lru_cache(maxsize=8)
def _context_of(side: ssl._SSLMethod, identity: Path, _changed_ns: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    if side is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
        context.load_verify_locations(identity / "ca.pem")
    except (OSError, ssl.SSLError) as error:
        raise NotFoundError(
            f"no usable host identity in {identity} (key.pem, cert.pem, ca.pem): {error}; "
            "make one with outboard pki init"
        ) from error
    return context


def _context(side: ssl._SSLMethod, identity: Path) -> ssl.SSLContext:
    """Made once for every state of the certificate's file: reading keys takes half as long as a handshake."""
    certificate = identity / "cert.pem"
    return _context_of(side, identity, certificate.stat().st_mtime_ns if certificate.exists() else 0)


def name_of(connection: ssl.SSLSocket) -> str:
    """The host's name: the first DNS name of the peer's certificate.

    :raise NotAuthorisedError: it has none.
    """
    certificate = connection.getpeercert() or {}
    for entry in certificate.get("subjectAltName", ()):
        if entry[0] == "DNS":
            return str(entry[1])
    raise NotAuthorisedError("the peer's certificate names no host")


def _check_name(name: str) -> None:
    # What the socket and ssl modules will do with it, which then would leave a socket open.
    try:
        if name.encode("idna"):
            return
    except UnicodeError:
        pass
    raise UsageError(f"{name!r} is neither a host name nor an address")


def connect(address: str, port: int, identity: Path, expected_name: str, timeout: float, pages: int = 0) -> Channel:
    """Connect to a host and see that it is the one that was meant.

    :param pages: how many pages the guest has that frames may speak of.
    :raise UnreachableError: nobody answers there within ``timeout`` seconds.
    :raise NotAuthorisedError: its certificate is not the cluster's, or another host's.
    :raise NotFoundError: this host has no identity.
    :raise UsageError: ``address`` or ``expected_name`` is none.
    """
    for name in (address, expected_name):
        _check_name(name)
    context = _context(ssl.PROTOCOL_TLS_CLIENT, identity)
    # A host may move between addresses; what must match is the name.
    try:
        raw = socket.create_connection((address, port), timeout)
    except OSError as error:
        raise UnreachableError(f"no answer from {expected_name} at {address} port {port}: {error}") from error
    try:
        secured = context.wrap_socket(raw, server_hostname=expected_name)
    except ssl.SSLCertVerificationError as error:
        raw.close()
        raise NotAuthorisedError(
            f"the host at {address} port {port} did not show {expected_name}'s certificate: {error.verify_message}"
        ) from error
    except OSError as error:
        raw.close()
        raise UnreachableError(f"the host at {address} port {port} does not speak TLS 1.3: {error}") from error
    return Channel(secured, expected_name, pages)


class Listener:
    """Accepts TLS connections.

    Handshakes are made in threads, so that a caller who says nothing holds up nobody; each has five seconds.

    :param ports: the first free one of this range is taken; it is ``port``.
    :raise KernelError: none is free, or the address is not this host's.

    Synchronization: one thread accepts. After :meth:`close` no thread of ours is left, so that the process may fork.
    """

    def __init__(self, address: str, ports: tuple[int, int], identity: Path) -> None:
        self._context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
        self._socket, self.port = _bind(address, ports)
        # A caller may be gone again between poll(2) and accept(2).
        self._socket.setblocking(False)
        self._made: queue.SimpleQueue[tuple[ssl.SSLSocket, str] | NotAuthorisedError | None] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(_HANDSHAKES)
        self._closing, self._stop = socket.socketpair()
        self._changing = threading.Lock()
        self._closed = False
        self._calls: set[ssl.SSLSocket] = set()
        self._threads: set[threading.Thread] = set()
        self._accepting = threading.Thread(target=self._accept_all, name="listener", daemon=True)
        self._accepting.start()

    def _accept_all(self) -> None:
        called, stopped = select.poll(), select.poll()
        called.register(self._socket, select.POLLIN)
        for poll in (called, stopped):
            poll.register(self._stop, select.POLLIN)
        while True:
            called.poll()
            self._slots.acquire()
            if stopped.poll(0):
                return
            try:
                raw, _ = self._socket.accept()
            except OSError:
                self._slots.release()
                stopped.poll(_RETRY_S * 1000)
                continue
            thread = threading.Thread(target=self._answer, args=(raw,), name="handshake", daemon=True)
            self._threads = {one for one in self._threads if one.is_alive()} | {thread}
            thread.start()

    def _answer(self, raw: socket.socket) -> None:
        try:
            raw.settimeout(_HANDSHAKE_S)
            # The handshake only once close() can find the call and end it.
            call = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        except OSError:
            raw.close()
        else:
            self._greet(call)
        finally:
            self._slots.release()

    def _greet(self, call: ssl.SSLSocket) -> None:
        with self._changing:
            if self._closed:
                call.close()
                return
            self._calls.add(call)
        made: tuple[ssl.SSLSocket, str] | NotAuthorisedError
        try:
            call.do_handshake()
            made = (call, name_of(call))
        except OSError as error:
            made = NotAuthorisedError(f"a caller could not show a certificate of this cluster: {error}")
        except NotAuthorisedError as error:
            made = error
        with self._changing:
            self._calls.discard(call)
            if self._closed or isinstance(made, NotAuthorisedError):
                call.close()
            # Refusals that nobody asks for do not pile up.
            if not self._closed and (isinstance(made, tuple) or self._made.qsize() < _HANDSHAKES):
                self._made.put(made)

    def accept(self, timeout: float | None, pages: int = 0) -> Channel:
        """The next connection whose handshake has succeeded.

        :param pages: how many pages the guest has that frames may speak of.
        :raise UnreachableError: none within ``timeout`` seconds, or the listener was closed.
        :raise NotAuthorisedError: a caller had no certificate of this cluster; others may follow.
        """
        try:
            made = self._made.get(timeout=timeout)
        except queue.Empty:
            raise UnreachableError(f"nobody called port {self.port} within {timeout:.0f} s") from None
        if made is None:
            self._made.put(None)
            raise UnreachableError(f"port {self.port} was closed")
        if isinstance(made, NotAuthorisedError):
            raise made
        return Channel(*made, pages)

    def close(self) -> None:
        """Stop listening, and end the handshakes under way and the calls that nobody accepted. Idempotent."""
        with self._changing:
            if self._closed:
                return
            self._closed = True
            for call in self._calls:
                # SSLSocket's own would forget the session that the handshake's thread is using.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(call, socket.SHUT_RDWR)
        self._closing.send(b"x")
        self._accepting.join()
        self._socket.close()
        for thread in self._threads:
            thread.join()
        while not self._made.empty():
            unclaimed = self._made.get()
            if isinstance(unclaimed, tuple):
                unclaimed[0].close()
        self._made.put(None)
        self._closing.close()
        self._stop.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _bind(address: str, ports: tuple[int, int]) -> tuple[socket.socket, int]:
    low, high = ports
    failure: OSError | None = None
    for port in range(low, high + 1):
        try:
            made = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        except OSError as error:
            failure = error
            continue
        return made, int(made.getsockname()[1])
    raise KernelError(f"listen on {address} ports {low} to {high}", failure.errno or 0 if failure else 0)
