"""Where a VMM that makes its own userfaultfd connects, and hands it over.

One listener is for one VM: whoever is let at its socket (mode 0660) can offer a guest, one at a time. Who connects and
says nothing, or half of something, is dropped after two seconds, the time that Cloud Hypervisor itself waits, and keeps
nobody else from being heard meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outboard.errors import KernelError, OutboardError, PeerError
from outboard.linux import pidfd
from outboard.vmm import sockets
from outboard.vmm.attachment import Attachment, receive
from outboard.vmm.cloud_hypervisor import CloudHypervisor
from outboard.vmm.handoff import Conversation, Handoff

_MOST = 8
"""Connections heard at once; others wait in the kernel's queue."""


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """Connections: that are being heard, that became an attachment, that were dropped with an error."""

    heard: int
    attached: int
    dropped: int


class _Newcomer:
    """A connection that has not handed anything over yet, and all that it made us open."""

    def __init__(self, connected: socket.socket, conversation: Conversation, until: float) -> None:
        self.socket = connected
        self.conversation = conversation
        self.until = until
        self.descriptors: list[int] = []
        self.pid = sockets.peer_pid(connected)
        if not self.pid:
            raise PeerError(f"{conversation.who} connected from a PID namespace that cannot be seen from here")
        try:
            self.pidfd = sockets.peer_pidfd(connected)
        except KernelError as error:
            raise PeerError(f"{conversation.who}, process {self.pid}, ended when it had connected") from error

    def advance(self) -> Handoff | None:
        message = receive(self.socket, self.conversation, self.descriptors)
        assert message is None or isinstance(message, Handoff)
        return message

    def drop(self) -> None:
        self.socket.close()
        pidfd.close(self.pidfd)
        for fd in self.descriptors:
            os.close(fd)


class Listener:
    """Listens at ``path`` for one kind of VMM.

    :param dialect: what it speaks: :class:`~outboard.vmm.cloud_hypervisor.CloudHypervisor`, or
        :class:`~outboard.vmm.firecracker.Firecracker`.
    :param name: what to call its guest; otherwise the VMM's kind and process.
    :param patience: seconds that a connection has for its handoff.
    :raise RefusedError: ``path-taken``. :raise KernelError: it cannot be listened there.

    Synchronization: one thread.
    """

    def __init__(
        self,
        path: Path,
        dialect: type[Conversation] = CloudHypervisor,
        *,
        name: str | None = None,
        patience: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._dialect = dialect
        self._name = name
        self._patience = patience
        self._clock = clock
        self._socket = sockets.listen(path)
        self._inode = path.stat(follow_symlinks=False).st_ino
        self._newcomers: list[_Newcomer] = []
        self._current: Attachment | None = None
        self._attached = self._dropped = 0

    def accept(self, timeout: float) -> Attachment | None:
        """Wait for a VMM that hands its userfaultfd over; None when none did within ``timeout`` seconds.

        The caller serves its faults, and then acknowledges.

        :raise PeerError: one that connected was dropped, and why; also one that hands over while an earlier attachment
            is not closed. The listener goes on: call again.
        :raise KernelError: we are not allowed to look at the VMM, or have no descriptor left.
        """
        until = self._clock() + timeout
        while True:
            left = min([until, *(newcomer.until for newcomer in self._newcomers)]) - self._clock()
            hearing = [self._socket] if len(self._newcomers) < _MOST else []
            waiting = [newcomer.socket for newcomer in self._newcomers]
            ready = sockets.readable([*hearing, *waiting], left)
            if self._socket in ready:
                self._let_in()
            for newcomer in [one for one in self._newcomers if one.socket in ready]:
                try:
                    handoff = newcomer.advance()
                except PeerError as error:
                    raise self._drop(newcomer, error) from error.__cause__
                if handoff is not None:
                    return self._attach(newcomer, handoff)
            for newcomer in self._newcomers:
                # Looked at after its words were: they may have come in time and waited for us.
                if newcomer.until <= self._clock():
                    raise self._drop(newcomer, PeerError(self._late(newcomer)))
            if not ready and self._clock() >= until:
                return None

    def statistics(self) -> ListenerStatistics:
        """A frozen snapshot."""
        return ListenerStatistics(len(self._newcomers), self._attached, self._dropped)

    def close(self) -> None:
        """Stop listening, and remove the socket if it is still ours; attachments stay. Idempotent."""
        for newcomer in self._newcomers:
            newcomer.drop()
        self._newcomers = []
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat(follow_symlinks=False)
            if stat.S_ISSOCK(found.st_mode) and found.st_ino == self._inode:
                self.path.unlink()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _let_in(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            raise KernelError(f"accept at {self.path}", error.errno or errno.EIO) from error
        try:
            self._newcomers.append(_Newcomer(connected, self._dialect(), self._clock() + self._patience))
        except PeerError:
            connected.close()
            self._dropped += 1
            raise

    def _drop(self, newcomer: _Newcomer, error: OutboardError) -> OutboardError:
        self._newcomers.remove(newcomer)
        newcomer.drop()
        self._dropped += 1
        return error

    def _late(self, newcomer: _Newcomer) -> str:
        said = "half of its handoff" if newcomer.conversation.partial else "nothing"
        return f"{self._dialect.who}, process {newcomer.pid}, connected and said {said} within {self._patience:g} s"

    def _attach(self, newcomer: _Newcomer, handoff: Handoff) -> Attachment:
        (uffd,) = newcomer.descriptors
        peer = (newcomer.pid, newcomer.pidfd)
        try:
            if self._current is not None and not self._current.closed:
                raise PeerError(
                    f"{self._dialect.who}, process {newcomer.pid}, hands over while process {self._current.pid} is "
                    "served here: close that attachment first, two would take each other's faults"
                )
            made = Attachment(newcomer.socket, newcomer.conversation, peer, handoff, uffd, self._name, self._clock)
        except OutboardError as error:
            raise self._drop(newcomer, error) from error.__cause__
        self._newcomers.remove(newcomer)
        self._attached += 1
        self._current = made
        return made
