"""A process of ours that is killed at its n-th system call: between any two steps that another process could see."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable

from outboard.linux import proc
from outboard.linux.libc import libc

_SEIZE, _INTERRUPT, _SYSCALL = 0x4206, 0x4207, 24
_WALL = 0x40000000


def _ptrace(request: int, tid: int) -> bool:
    return int(libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), None, None)) == 0


def _thread(pid: int, name: str) -> int:
    """Wait until a thread has given itself that name."""
    while True:
        for one in proc.threads(pid):
            if one.name == name:
                return one.tid
        os.sched_yield()


def killed_at(stop: int, prepare: Callable[[], object], work: Callable[[], object], thread: str | None = None) -> bool:
    """Fork; ``prepare`` there and then ``work``, and SIGKILL the process at a beginning or an end of a system call.

    :param stop: which of them, counted from 1; :param thread: the name of the thread whose they are, the main one's if
        not given.
    :return: whether it came so far; if not, ``work`` has been done whole.
    """
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            os.write(ready[1], b"r")
            os.read(go[0], 1)
            work()
            status = 0
        finally:
            os._exit(status)
    tid = child
    try:
        assert os.read(ready[0], 1) == b"r"
        tid = child if thread is None else _thread(child, thread)
        assert _ptrace(_SEIZE, tid)
        assert _ptrace(_INTERRUPT, tid)
        os.waitpid(tid, _WALL)
        os.write(go[1], b"g")
        for _ in range(stop):
            assert _ptrace(_SYSCALL, tid)
            _, status = os.waitpid(tid, _WALL)
            if not os.WIFSTOPPED(status):
                assert status == 0, "the work failed by itself"
                return False
        return True
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            if tid != child:
                os.waitpid(tid, _WALL)
            os.waitpid(child, 0)
        for end in (*ready, *go):
            os.close(end)
