"""process_madvise(2): advice about another process's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum

from outboard.linux.libc import syscall

SYS_process_madvise = 440
_MOST = 1024
"""UIO_MAXIOV."""


class Advice(IntEnum):
    """MADV_*, those that may be given to another process."""

    WILLNEED = 3
    COLD = 20
    PAGEOUT = 21
    """On shared memory without swap: drop the page table entries, keep the pages."""
    COLLAPSE = 25
    """Linux 6.1."""


def advise(pidfd: int, ranges: Sequence[tuple[int, int]], advice: Advice) -> int:
    """Advise on (address, length) ranges, 1024 a call; how many bytes were advised on.

    :raise KernelError: EINVAL: that advice does not go with that mapping; EPERM.
    """
    done = 0
    for at in range(0, len(ranges), _MOST):
        part = ranges[at : at + _MOST]
        vector = (ctypes.c_uint64 * (2 * len(part)))(*(word for one in part for word in one))
        done += syscall(
            f"process_madvise({advice.name})",
            SYS_process_madvise,
            pidfd,
            ctypes.addressof(vector),
            len(part),
            advice,
            0,
        )
    return done
