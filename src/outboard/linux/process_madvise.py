"""process_madvise(2): advice about another process's memory."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

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


def advise(pidfd: int, ranges: Sequence[tuple[int, int]] | NDArray[np.uint64], advice: Advice) -> int:
    """Advise on (address, length) ranges, in bytes, 1024 a call; how many bytes were advised on, which is all of them.

    :param ranges: a sequence, or an array of shape (n, 2).
    :raise KernelError: EINVAL: that advice does not go with that mapping; ENOMEM: nothing is mapped there; EPERM. The
        ranges before the one that was refused have been advised on.
    """
    vector = np.ascontiguousarray(ranges, dtype=np.uint64).reshape(-1, 2)
    done = at = 0
    while at < len(vector):
        part = vector[at : at + _MOST]
        step = syscall(
            f"process_madvise({advice.name}) of {len(part)} ranges from {int(part[0, 0]):#x} on",
            SYS_process_madvise,
            pidfd,
            part.ctypes.data,
            len(part),
            advice,
            0,
        )
        done += step
        # Where a range is refused the kernel tells the bytes of those before it; asked again from there, it tells why.
        at += int(np.searchsorted(np.cumsum(part[:, 1]), step, side="right"))
    return done
