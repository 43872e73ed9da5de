"""prctl(2): what a process says about itself."""

from __future__ import annotations

import ctypes
import signal

from outboard.errors import KernelError
from outboard.linux.libc import libc

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


def set_parent_death_signal(number: signal.Signals) -> None:
    """Get ``number`` when the thread that forked us ends.

    A parent that had ended before is not noticed: compare getppid(2) afterwards.
    """
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0) < 0:
        raise KernelError("prctl(PR_SET_PDEATHSIG)", ctypes.get_errno())


def set_name(name: str) -> None:
    """Set this thread's name in process listings, cut to 15 bytes."""
    libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)
