"""Requests over many runs of pages, compiled: no interpreter between two pages.

``regions`` has a row for each region: first page, pages, HVA, offset in its file, the file's descriptor. ``runs`` are
(first page, pages), none across an edge of regions. Each function answers 0 or a negated errno, and stops at the first
refusal. EAGAIN, the answer while the address space changes, is tried again: whoever serves the faults reads the event.

Sources: ioctl_userfaultfd(2), pread(2), fallocate(2), lseek(2).
"""

from __future__ import annotations

import errno
import os

import numpy as np
import numpy.ma  # numba does at its first call: engines are forked with it, and guests wait for those
from numba import njit, types
from numpy.typing import NDArray

from outboard.linux import fallocate, native
from outboard.linux.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_WAKE, UFFDIO_WRITEPROTECT
from outboard.pages import PAGE_SIZE
from outboard.pages.content import is_zero, page_digest
from outboard.pages.shared import claim_one, release_one

_COPY, _CONTINUE, _PROTECT, _WAKE = (
    request.number for request in (UFFDIO_COPY, UFFDIO_CONTINUE, UFFDIO_WRITEPROTECT, UFFDIO_WAKE)
)
_EEXIST, _EAGAIN, _EFAULT, _EIO = errno.EEXIST, errno.EAGAIN, errno.EFAULT, errno.EIO
_ENXIO, _EBUSY = errno.ENXIO, errno.EBUSY
_SEEK_DATA = os.SEEK_DATA
_LOOK = 16
"""Pages that are read and looked at together."""
_PATIENCE = 20
"""Milliseconds, for a large page that the kernel cannot split."""
_PUNCH = fallocate.FALLOC_FL_PUNCH_HOLE | fallocate.FALLOC_FL_KEEP_SIZE

_ROWS, _I8, _U1 = types.int64[:, ::1], types.int64[::1], types.uint8[::1]


@njit(types.int64(_ROWS, types.int64), cache=True, nogil=True)
def row_of(regions: NDArray[np.int64], page: int) -> int:
    """The row of the region that holds a page."""
    for row in range(regions.shape[0]):
        if regions[row, 0] <= page < regions[row, 0] + regions[row, 1]:
            return row
    return 0


@njit(types.int64(_ROWS, types.int64), cache=True, nogil=True)
def _hva(regions: NDArray[np.int64], page: int) -> int:
    row = row_of(regions, page)
    return int(regions[row, 2] + (page - regions[row, 0]) * PAGE_SIZE)


@njit(_ROWS(_ROWS, _I8), cache=True, nogil=True)
def runs_of(regions: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs of page numbers, which ascend."""
    runs = np.empty((numbers.size, 2), dtype=np.int64)
    count, edge = 0, 0
    for page in numbers:
        if count and page < edge and page == runs[count - 1, 0] + runs[count - 1, 1]:
            runs[count - 1, 1] += 1
            continue
        row = row_of(regions, page)
        edge = regions[row, 0] + regions[row, 1]
        runs[count, 0], runs[count, 1] = page, 1
        count += 1
    return runs[:count].copy()


@njit(types.int64(types.int32, types.uint64, _I8), cache=True, nogil=True)
def _ask(uffd: int, request: int, room: NDArray[np.int64]) -> int:
    while True:
        answer = native.ioctl(uffd, request, room.ctypes.data)
        if answer != -_EAGAIN:
            return answer
        native.poll(0, 0, 1)


@njit(types.int64(types.int32, types.int64, types.int64), cache=True, nogil=True)
def wake_range(uffd: int, hva: int, length: int) -> int:
    """Let threads that wait in ``length`` bytes from ``hva`` on look again; 0 or a negated errno."""
    room = np.empty(2, dtype=np.int64)
    room[0], room[1] = hva, length
    while True:
        answer = native.ioctl(uffd, _WAKE, room.ctypes.data)
        if answer != -_EAGAIN:
            return answer
        native.poll(0, 0, 1)


@njit(
    types.int64(types.int32, types.int64, types.int64, types.int64, types.int64, types.int32, types.int64),
    cache=True,
    nogil=True,
)
def copy(uffd: int, hva: int, source: int, length: int, step: int, over: int, offset: int) -> int:
    """Enter ``length`` bytes from address ``source`` on at ``hva`` where nothing is.

    What is there stays, or is written over in the file ``over``, and who waits for it looks again.

    :param step: the size of a page there. :param over: a descriptor, -1 for none; :param offset: of ``hva`` in it.
    :return: 0 or a negated errno.
    """
    room = np.empty(5, dtype=np.int64)
    end = hva + length
    while hva < end:
        room[0], room[1], room[2], room[3], room[4] = hva, source, end - hva, 0, 0
        answer = native.ioctl(uffd, _COPY, room.ctypes.data)
        done = room[4] if room[4] != 0 else answer
        if answer == 0:
            done = end - hva
        elif done == -_EEXIST:
            if over >= 0:
                answer = native.pwrite(over, source, step, offset)
                if answer != step:
                    return answer if answer < 0 else -_EIO
            # A fault may have found it so between our copy and its own.
            answer = wake_range(uffd, hva, step)
            if answer < 0:
                return answer
            done = step
        elif done == -_EAGAIN:
            native.poll(0, 0, 1)
            continue
        elif done < 0:
            return int(done)
        hva += done
        source += done
        offset += done
    return 0


@njit(types.int64(types.int32, _ROWS, _ROWS, types.int64), cache=True, nogil=True)
def protect(uffd: int, regions: NDArray[np.int64], runs: NDArray[np.int64], protected: int) -> int:
    """Write-protect runs (1), or lift that and wake who waits to write (0)."""
    room = np.empty(3, dtype=np.int64)
    for index in range(runs.shape[0]):
        room[0], room[1], room[2] = _hva(regions, runs[index, 0]), runs[index, 1] * PAGE_SIZE, protected
        answer = _ask(uffd, _PROTECT, room)
        if answer < 0:
            return answer
    return 0


@njit(types.int64(types.int32, _ROWS, _ROWS), cache=True, nogil=True)
def wake(uffd: int, regions: NDArray[np.int64], runs: NDArray[np.int64]) -> int:
    """Let threads that wait for pages of the runs look again."""
    room = np.empty(2, dtype=np.int64)
    for index in range(runs.shape[0]):
        room[0], room[1] = _hva(regions, runs[index, 0]), runs[index, 1] * PAGE_SIZE
        answer = _ask(uffd, _WAKE, room)
        if answer < 0:
            return answer
    return 0


@njit(types.int64(_ROWS, _ROWS, _U1), cache=True, nogil=True)
def read(regions: NDArray[np.int64], runs: NDArray[np.int64], into: NDArray[np.uint8]) -> int:
    """Read the runs from the guest's files into ``into``, one after the other."""
    at = into.ctypes.data
    for index in range(runs.shape[0]):
        row = row_of(regions, runs[index, 0])
        offset = regions[row, 3] + (runs[index, 0] - regions[row, 0]) * PAGE_SIZE
        length = runs[index, 1] * PAGE_SIZE
        answer = native.pread(regions[row, 4], at, length, offset)
        if answer != length:
            return answer if answer < 0 else -_EIO
        at += length
    return 0


@njit(types.int64(_ROWS, _ROWS, _U1, types.boolean[::1], types.uint64[::1]), cache=True, nogil=True)
def read_and_look(
    regions: NDArray[np.int64],
    runs: NDArray[np.int64],
    into: NDArray[np.uint8],
    zero: NDArray[np.bool_],
    digests: NDArray[np.uint64],
) -> int:
    """:func:`read`, and say of each page whether it is all zeros, and what its digest is otherwise.

    It is looked at while the processor's caches have it.
    """
    at, page = into.ctypes.data, 0
    for index in range(runs.shape[0]):
        row = row_of(regions, runs[index, 0])
        offset = regions[row, 3] + (runs[index, 0] - regions[row, 0]) * PAGE_SIZE
        left = runs[index, 1]
        while left > 0:
            count = min(left, _LOOK)
            length = count * PAGE_SIZE
            answer = native.pread(regions[row, 4], at, length, offset)
            if answer != length:
                return answer if answer < 0 else -_EIO
            for one in range(page, page + count):
                zero[one] = is_zero(into, one)
                if not zero[one]:
                    digests[one] = page_digest(into.ctypes.data + one * PAGE_SIZE)
            at += length
            offset += length
            page += count
            left -= count
    return 0


@njit(types.int64(_ROWS, _ROWS), cache=True, nogil=True)
def punch(regions: NDArray[np.int64], runs: NDArray[np.int64]) -> int:
    """Free the memory of the runs, which unmaps it.

    A part of a large page that somebody holds on to cannot be split off: the kernel fills it with zeros instead, and it
    is present as before. EBUSY: that is what has become of one or more of the runs.
    """
    for index in range(runs.shape[0]):
        row = row_of(regions, runs[index, 0])
        offset = regions[row, 3] + (runs[index, 0] - regions[row, 0]) * PAGE_SIZE
        length = runs[index, 1] * PAGE_SIZE
        tries = 0
        while True:
            answer = native.fallocate(regions[row, 4], _PUNCH, offset, length)
            if answer < 0:
                return answer
            data = native.lseek(regions[row, 4], offset, _SEEK_DATA)
            if data == -_ENXIO or data >= offset + length:
                break
            if data < 0:
                return data
            tries += 1
            if tries > _PATIENCE:
                return -_EBUSY
            native.poll(0, 0, 1)
    return 0


@njit(types.int64(types.int32, _ROWS, _ROWS, _U1, types.boolean), cache=True, nogil=True)
def place(
    uffd: int, regions: NDArray[np.int64], runs: NDArray[np.int64], content: NDArray[np.uint8], over: bool
) -> int:
    """Enter pages that are absent; what is present already stays, or is written ``over``."""
    source = content.ctypes.data
    for index in range(runs.shape[0]):
        row = row_of(regions, runs[index, 0])
        inside = (runs[index, 0] - regions[row, 0]) * PAGE_SIZE
        length = runs[index, 1] * PAGE_SIZE
        file = regions[row, 4] if over else -1
        answer = copy(uffd, regions[row, 2] + inside, source, length, PAGE_SIZE, file, regions[row, 3] + inside)
        if answer < 0:
            return answer
        source += length
    return 0


@njit(types.int64(types.int32, _ROWS, _ROWS), cache=True, nogil=True)
def map_present(uffd: int, regions: NDArray[np.int64], runs: NDArray[np.int64]) -> int:
    """Map pages that the files hold; what is mapped already, or not held, is passed over."""
    room = np.empty(4, dtype=np.int64)
    for index in range(runs.shape[0]):
        hva = _hva(regions, runs[index, 0])
        end = hva + runs[index, 1] * PAGE_SIZE
        while hva < end:
            room[0], room[1], room[2], room[3] = hva, end - hva, 0, 0
            answer = native.ioctl(uffd, _CONTINUE, room.ctypes.data)
            done = room[3] if room[3] != 0 else answer
            if answer == 0:
                done = end - hva
            elif done == -_EEXIST or done == -_EFAULT:  # compiled as it stands
                done = PAGE_SIZE
            elif done == -_EAGAIN:
                native.poll(0, 0, 1)
                continue
            elif done < 0:
                return int(done)
            hva += done
    return 0


@njit(types.int64(_U1, _I8, types.boolean[::1]), cache=True, nogil=True)
def claim(flags: NDArray[np.uint8], pages: NDArray[np.int64], ours: NDArray[np.bool_]) -> int:
    """Claim pages, each on its own, and say of each whether it is ours now; how many are."""
    count = 0
    for index in range(pages.size):
        ours[index] = claim_one(flags, pages[index])
        count += ours[index]
    return count


@njit(types.void(_U1, _I8), cache=True, nogil=True)
def release(flags: NDArray[np.uint8], pages: NDArray[np.int64]) -> None:
    """Give claimed pages up; wake who waits for them afterwards."""
    for index in range(pages.size):
        release_one(flags, pages[index])
