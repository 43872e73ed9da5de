"""A VMM that has handed its userfaultfd over: the guest, the userfaultfd, and the connection that tells of new memory.

The VMM keeps a descriptor of the userfaultfd itself. When an attachment is closed, or its process dies, its guest
waits at the next fault, until the VMM hands the same userfaultfd to whoever listens then. One process at a time reads
it: two would take each other's faults.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable

from outboard.errors import KernelError, PeerError
from outboard.linux import pidfd, proc
from outboard.linux.userfaultfd import Features, Userfaultfd
from outboard.pages import PAGE_SIZE
from outboard.vmm import claims, sockets
from outboard.vmm.guest import Guest, Region
from outboard.vmm.handoff import Claim, Conversation, Handoff

_ANSWER = b"\x01"
_UNSERVABLE = Features.EVENT_FORK | Features.SIGBUS
"""Each fork of the VMM would open a descriptor here; faults that become signals never come here."""
_ROOM = socket.CMSG_SPACE(2 * 4)
"""Of descriptors: what does not fit is dropped by the kernel, and that it was is told."""


def receive(connected: socket.socket, conversation: Conversation, kept: list[int]) -> Handoff | Claim | None:
    """Take what has come, without waiting; the message that it ends, if it does.

    :param kept: gets the descriptors that came, also if this raises.
    :raise PeerError: it is not what the VMM may say, or the connection has ended.
    """
    try:
        data, ancillary, flags, _ = connected.recvmsg(
            conversation.wanted(), _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
    except BlockingIOError:
        return None
    except ConnectionResetError:
        # It closed the connection without reading our answer.
        conversation.ended()
        return None
    came: list[int] = []
    for level, kind, raw in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            came += memoryview(raw[: len(raw) // 4 * 4]).cast("i")
    kept += came
    if flags & socket.MSG_CTRUNC:
        raise PeerError(f"{conversation.who} sent more descriptors than any message of its has")
    if not data:
        conversation.ended()
        return None
    return conversation.receive(data, len(came))


class Attachment:
    """A guest by courtesy of its VMM. Made by :class:`outboard.vmm.listener.Listener`.

    :ivar uffd: non-blocking; its memory is registered in ``mode``, and ``features`` is what the kernel says it has.

    Synchronization: one thread, but for ``uffd`` and ``guest``, which have rules of their own.
    """

    def __init__(
        self,
        connected: socket.socket,
        conversation: Conversation,
        peer: tuple[int, int],
        handoff: Handoff,
        uffd: int,
        name: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Check what was handed over. Takes over the socket, the pidfd and the userfaultfd if it does not raise.

        :param peer: pid and pidfd of the process that connected.
        :raise PeerError: what was handed over is not what it is said to be, or cannot be served.
        :raise KernelError: we are not allowed to look at the VMM.
        """
        self._socket = connected
        self._conversation = conversation
        self.pid, self._pidfd = peer
        self._clock = clock
        self.mode = handoff.mode
        self.uffd = Userfaultfd(uffd)
        self._owed = conversation.answered
        if handoff.pid not in (None, self.pid):
            raise PeerError(
                f"{conversation.who} says that it is process {handoff.pid}, and process {self.pid} connected; a VMM in "
                "a PID namespace of its own cannot be managed from outside it"
            )
        self.features = self._check(handoff)
        self._guests: list[Guest] = []
        self._take(handoff.claims, name or f"{conversation.who.lower().replace(' ', '-')}-{self.pid}")

    @property
    def guest(self) -> Guest:
        """The guest with all of its memory."""
        return self._guests[-1]

    @property
    def alive(self) -> bool:
        """Whether the VMM runs; it may, also when the connection has ended."""
        return not pidfd.wait(self._pidfd, 0)

    @property
    def closed(self) -> bool:
        """Whether it has been let go."""
        return self.uffd.fileno() < 0

    def acknowledge(self) -> None:
        """Tell the VMM that faults are served from now on, within 2 s of what it said. Idempotent.

        :raise PeerError: it has given up waiting.
        """
        if not self._owed:
            return
        try:
            self._socket.send(_ANSWER, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise PeerError(f"{self._who} did not wait for an answer: {os.strerror(error.errno or 0)}") from error
        self._owed = False

    def fileno(self) -> int:
        """The connection: readable when the VMM has something to say, or has hung up; -1 when it has ended."""
        return self._socket.fileno()

    def receive(self, timeout: float = 2.0) -> Guest | None:
        """Wait for memory that is added; the guest with it, to be acknowledged. None: the VMM has hung up.

        Earlier guests stay usable until :meth:`close`.

        :param timeout: seconds.
        :raise PeerError: what came is not what the VMM may say, or nothing whole came in time. The connection has
            ended then, and the VMM takes us for gone; what was handed over before can be served on until :meth:`close`.
        """
        until = self._clock() + timeout
        kept: list[int] = []
        try:
            while self._socket.fileno() >= 0:
                left = until - self._clock()
                if left <= 0 or not sockets.readable([self._socket], left):
                    raise PeerError(f"{self._who} sent no whole message within {timeout:g} s")
                claim = receive(self._socket, self._conversation, kept)
                if isinstance(claim, Claim):
                    self._take((claim,), self.guest.name)
                    self._owed = self._conversation.answered
                    return self.guest
                if self._conversation.over:
                    break
        except BaseException:
            self._socket.close()
            raise
        finally:
            for fd in kept:
                os.close(fd)
        self._socket.close()
        return None

    def close(self) -> None:
        """Let go: of the connection, the guest and our descriptor of the userfaultfd. Idempotent."""
        self._socket.close()
        self.uffd.close()
        for guest in self._guests:
            guest.close()
        if self._pidfd >= 0:
            pidfd.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def _who(self) -> str:
        return f"{self._conversation.who} (process {self.pid})"

    def _check(self, handoff: Handoff) -> Features:
        try:
            features = self.uffd.enabled()
        except KernelError as error:
            raise PeerError(f"what {self._who} handed over is no userfaultfd") from error
        if handoff.features & ~features:
            raise PeerError(f"{self._who} names {handoff.features!r}, and its userfaultfd has {features!r}")
        if features & _UNSERVABLE:
            raise PeerError(f"{self._who} handed over a userfaultfd with {features & _UNSERVABLE!r}: it is not served")
        # On a blocking one poll(2) says POLLERR, and a read that comes second waits.
        os.set_blocking(self.uffd.fileno(), False)
        return features

    def _take(self, more: tuple[Claim, ...], name: str) -> None:
        """Check memory that the VMM tells of, and let the guest have it.

        :raise PeerError: it is not as it says.
        """
        before = self._guests[-1].regions if self._guests else ()
        try:
            regions = claims.regions_of(more, proc.maps(self.pid), claims.page_size_in(self.pid), before)
            self._check_registered(regions)
            guest = self.guest.grown(regions) if self._guests else Guest(name, self.pid, regions)
        except KernelError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                raise
            raise PeerError(f"the memory of {self._who} is gone, or changes: {error}") from error
        try:
            claims.check_files(guest.memory)
            if not self.alive:
                # Only now is it certain that what was opened by number was its.
                raise PeerError(f"{self._who} ended while it handed over")
        except PeerError:
            guest.close()
            raise
        self._guests.append(guest)

    def _check_registered(self, regions: tuple[Region, ...]) -> None:
        """See that the userfaultfd has the regions, by registering them with it: a second time changes nothing."""
        for region in regions:
            try:
                self.uffd.register(region.hva, region.pages * PAGE_SIZE, self.mode)
            except KernelError as error:
                raise PeerError(
                    f"{self._who} did not register its memory at {region.hva:#x} with what it handed over: {error}"
                ) from error
            # A fault that an earlier manager read and did not live to answer is not told twice: whoever waits for it
            # is woken, and faults again.
            self.uffd.wake(region.hva, region.pages * PAGE_SIZE)
