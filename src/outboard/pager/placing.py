"""Placing what arrives, compiled: no interpreter between two pages.

``regions`` as in :mod:`outboard.pager.batches`. Sources: ioctl_userfaultfd(2), pwrite(2), fallocate(2).
"""

from __future__ import annotations

import errno

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.linux import fallocate, native
from outboard.pager.batches import copy, row_of, wake_range
from outboard.pages import PAGE_SIZE
from outboard.pages.residency import Where

_EIO = errno.EIO
_PUNCH = fallocate.FALLOC_FL_PUNCH_HOLE | fallocate.FALLOC_FL_KEEP_SIZE
_RESIDENT, _ZERO = int(Where.RESIDENT), int(Where.ZERO)

_ROWS, _I8, _U1, _FLAGS = types.int64[:, ::1], types.int64[::1], types.uint8[::1], types.boolean[::1]
_CONTENT = types.Array(types.uint8, 1, "C", readonly=True)


@njit(types.int64(types.int32, _ROWS, _U1, _U1, types.boolean, _ROWS, _FLAGS, _CONTENT, _I8), cache=True, nogil=True)
def place(
    uffd: int,
    regions: NDArray[np.int64],
    where: NDArray[np.uint8],
    waiting: NDArray[np.uint8],
    running: bool,
    runs: NDArray[np.int64],
    zero: NDArray[np.bool_],
    content: NDArray[np.uint8],
    met: NDArray[np.int64],
) -> int:
    """Place the pages of ``runs``, each of one page size of 4 KiB, as they have come.

    Before the guest runs the later content stands: what is present is written over. From then on what is present is the
    truth. Zeros cost no memory.

    :param where: of the residency; :param waiting: set for pages that somebody waits for.
    :param zero: one a page of ``runs``; :param content: of those that are not.
    :param met: takes the numbers of the pages placed that somebody waits for.
    :return: how many those are, or a negated errno.
    """
    source = content.ctypes.data
    index = found = 0
    for run in range(runs.shape[0]):
        page, last = runs[run, 0], runs[run, 0] + runs[run, 1]
        while page < last:
            row = row_of(regions, page)
            edge = min(last, regions[row, 0] + regions[row, 1])
            empty, present = zero[index], where[page] == _RESIDENT
            count = 1
            while (
                page + count < edge and zero[index + count] == empty and (where[page + count] == _RESIDENT) == present
            ):
                count += 1
            inside = (page - regions[row, 0]) * PAGE_SIZE
            hva, offset, length = regions[row, 2] + inside, regions[row, 3] + inside, count * PAGE_SIZE
            answer = 0
            if present and not running:
                if empty:
                    answer = native.fallocate(regions[row, 4], _PUNCH, offset, length)
                    where[page : page + count] = _ZERO
                else:
                    answer = native.pwrite(regions[row, 4], source, length, offset)
                    if 0 <= answer < length:
                        answer = -_EIO
            elif not present:
                if empty:
                    where[page : page + count] = _ZERO
                    answer = wake_range(uffd, hva, length)
                else:
                    # A hole may not have become one, where it was in the middle of a large page.
                    over = -1 if running else regions[row, 4]
                    answer = copy(uffd, hva, source, length, PAGE_SIZE, over, offset)
                    where[page : page + count] = _RESIDENT
            if answer < 0:
                return answer
            if not empty:
                source += length
                for one in range(page, page + count):
                    if waiting[one]:
                        met[found] = one
                        found += 1
            page += count
            index += count
    return found
