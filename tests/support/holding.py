"""Holding an engine at one system call, from outside, so that a migration stands still in a state that is short."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from types import TracebackType

from outboard.linux.libc import libc
from outboard.linux.ptrace import PTRACE_DETACH, PTRACE_SEIZE, user_regs_struct

_GETREGS, _INTERRUPT, _SYSCALL = 12, 0x4207, 24
_SYSGOOD = 1
_WALL = 0x40000000
_LINK = frozenset({86, 265})
"""link(2), linkat(2)."""
_ENTRY = (1 << 64) - errno.ENOSYS
"""In rax when a system call begins."""


class HeldAtLink:
    """Holds process ``pid`` where it makes a file's second name, which is how a verdict is written down.

    :param after: hold it when that has been done, not before.

    The process may be killed while it is held. A context manager, which lets go.
    """

    def __init__(self, pid: int, *, after: bool) -> None:
        self._pid, self._after = pid, after
        self._held, self._go = threading.Event(), threading.Event()
        self._seized = threading.Event()
        # ptrace(2) answers only to the thread that seized.
        self._thread = threading.Thread(target=self._trace, daemon=True, name="held-at-link")
        self._thread.start()
        assert self._seized.wait(30)

    @property
    def held(self) -> bool:
        """Whether it has come there."""
        return self._held.is_set()

    def let_go(self) -> None:
        """Let it go on. Idempotent."""
        self._go.set()
        self._thread.join(60)

    def _request(self, request: int, data: int = 0) -> None:
        if libc.ptrace(request, self._pid, None, data) < 0:
            raise ProcessLookupError(self._pid)

    def _registers(self) -> user_regs_struct:
        registers = user_regs_struct()
        if libc.ptrace(_GETREGS, self._pid, None, ctypes.addressof(registers)) < 0:
            raise ProcessLookupError(self._pid)
        return registers

    def _trace(self) -> None:
        try:
            self._request(PTRACE_SEIZE, _SYSGOOD)
            self._seized.set()
            self._request(_INTERRUPT)
            self._wait()
            while not self._go.is_set() and not self._there():
                continue
            if not self._go.is_set():
                self._held.set()
                self._go.wait()
            self._request(PTRACE_DETACH)
        except (ProcessLookupError, ChildProcessError):
            # It was killed.
            self._seized.set()

    def _there(self) -> bool:
        self._request(_SYSCALL)
        if self._wait() != signal.SIGTRAP | 0x80:
            return False
        registers = self._registers()
        began = registers.rax == _ENTRY
        return registers.orig_rax in _LINK and began != self._after

    def _wait(self) -> int:
        """Wait for its next stop, and hand on signals; the stop's signal."""
        while True:
            _, status = os.waitpid(self._pid, _WALL)
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(self._pid)
            stop = os.WSTOPSIG(status)
            if stop & 0x7F == signal.SIGTRAP or status >> 16:
                return stop
            self._request(_SYSCALL, stop)

    def __enter__(self) -> HeldAtLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()
