"""prctl(2): what a process says about itself."""

from __future__ import annotations

import ctypes
import signal

from outboard.errors import KernelError
from outboard.linux.libc import libc

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]


def set_parent_death_signal(number: signal.Signals) -> None:
    """Get ``number`` when the thread that forked us ends.

    A parent that had ended before is not noticed: compare getppid(2) afterwards.
    """
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) < 0:
        raise KernelError("prctl(PR_SET_PDEATHSIG)", ctypes.get_errno())


def set_name(name: str) -> None:
    """Set this thread's name in process listings, which the kernel cuts to 15 bytes."""
    raw = ctypes.create_string_buffer(name.encode())
    if libc.prctl(PR_SET_NAME, ctypes.addressof(raw), 0, 0, 0) < 0:
        raise KernelError("prctl(PR_SET_NAME)", ctypes.get_errno())
