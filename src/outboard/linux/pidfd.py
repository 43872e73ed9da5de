"""pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2): processes by descriptor, which no other process can inherit."""

from __future__ import annotations

import errno
import os
import select
import signal

from outboard.errors import KernelError
from outboard.linux import libc

SYS_pidfd_send_signal = 424
SYS_pidfd_open = 434
SYS_pidfd_getfd = 438


def open(pid: int) -> int:  # the man page's name
    """A descriptor of process ``pid``; readable when it has ended.

    :raise KernelError: ESRCH: there is no such process.
    """
    return libc.syscall(f"pidfd_open of process {pid}", SYS_pidfd_open, pid, 0)


def close(pidfd: int) -> None:
    """Close a descriptor, forgiving one that is closed already."""
    libc.close(pidfd)


def getfd(pidfd: int, number: int) -> int:
    """A duplicate of the process's descriptor ``number``.

    :raise KernelError: EPERM: needs the right to ptrace it; EBADF: it has no such descriptor.
    """
    return libc.syscall(f"pidfd_getfd of descriptor {number}", SYS_pidfd_getfd, pidfd, number, 0)


def send_signal(pidfd: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was still there to get it."""
    try:
        libc.syscall(f"pidfd_send_signal {number.name}", SYS_pidfd_send_signal, pidfd, number, 0, 0)
    except KernelError as error:
        if error.errno != errno.ESRCH:
            raise
        return False
    return True


def wait(pidfd: int, timeout: float | None) -> bool:
    """Wait until the process has ended; False when ``timeout`` seconds passed first."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def alive(pid: int) -> bool:
    """Whether process ``pid`` runs: a zombie does not."""
    try:
        pidfd = open(pid)
    except KernelError:
        return False
    try:
        return not wait(pidfd, 0)
    finally:
        os.close(pidfd)
