"""Noticing accesses to zapped pages: two loops, compiled, each the whole work of a thread without the GIL.

:func:`look` asks the page tables. A page is looked at more and more rarely: again after about a sixteenth of the time
that it has been zapped, so that the moment of its access is known to that part of its age. An access costs the guest a
fault of the kernel's own and nobody's wake-up: 7 to 9 us with the zap before it, on two cores of a virtual machine.

:func:`answer` answers the minor faults of a userfaultfd. It knows the moment to the microsecond, and the thread that
touched the page sleeps until it is answered: 70 to 170 us there.

Both are asked over an eventfd and answer over another, which makes the memory that both sides use theirs in turn.
"""

from __future__ import annotations

import errno

import numpy as np
from numba import njit
from numpy.typing import NDArray

from outboard.linux import native
from outboard.linux.pagemap import PRESENT_ENTRY, WRITE_PROTECTED_ENTRY
from outboard.linux.userfaultfd import UFFDIO_CONTINUE, UFFDIO_WAKE, EventKind, FaultFlag
from outboard.pages.traps import note
from outboard.trace.running import follow

STOP, WATCH, LOOK = range(3)
"""What can be asked: to end, to watch more pages, to look at all of them now."""

ASKED, ROWS, HEAP, LOOKS, FAULTS, AT_ONCE, FAILED, PROTECTED = range(8)
"""The words of ``control``: the request, how many rows of ``fresh`` it gives; bytes of the heap; looks, faults, and
pages found touched at the first look, so far; the errno that ended the work; whether what is armed is also
write-protected."""

_AT_LEAST_NS = 30_000
_PART = 16
_EEXIST, _EAGAIN, _ESRCH = -errno.EEXIST, -errno.EAGAIN, -errno.ESRCH
_PAGEFAULT, _MINOR, _WRITE = int(EventKind.PAGEFAULT), int(FaultFlag.MINOR), int(FaultFlag.WRITE)
_CONTINUE, _WAKE = UFFDIO_CONTINUE.number, UFFDIO_WAKE.number
_IDLE_NS = 1_000_000_000
_MESSAGES = 64


@njit(inline="always")
def _due(heap: NDArray[np.int64], index: int) -> int:
    """When a page (number, address, zapped at, last looked at) is to be looked at again."""
    zapped, last = heap[index, 2], heap[index, 3]
    # A half to three halves of the sixteenth, by the page: were all looked at at the same ages, accesses would seem to
    # happen at those.
    part = (zapped >> 4 & 255) + 128
    return last + max(_AT_LEAST_NS, (last - zapped) // (256 * _PART) * part)  # type: ignore[no-any-return]


@njit("void(int64[:, ::1], int64, int64)", cache=True, nogil=True)
def _sink(heap: NDArray[np.int64], size: int, index: int) -> None:
    while True:
        least = index
        for child in (2 * index + 1, 2 * index + 2):
            if child < size and _due(heap, child) < _due(heap, least):
                least = child
        if least == index:
            return
        for column in range(4):
            heap[index, column], heap[least, column] = heap[least, column], heap[index, column]
        index = least


@njit("void(int64[:, ::1], int64)", cache=True, nogil=True)
def _rise(heap: NDArray[np.int64], index: int) -> None:
    while index > 0:
        parent = (index - 1) // 2
        if _due(heap, parent) <= _due(heap, index):
            return
        for column in range(4):
            heap[index, column], heap[parent, column] = heap[parent, column], heap[index, column]
        index = parent


@njit(
    "boolean(int32, int32, int64[::1], int64[:, ::1], int64, uint8[::1], int64[::1], int64[:, ::1], int64[::1], "
    "int64[::1])",
    cache=True,
    nogil=True,
)
def _still_waits(
    pagemap: int,
    clock: int,
    seen: NDArray[np.int64],
    heap: NDArray[np.int64],
    index: int,
    traced: NDArray[np.uint8],
    state: NDArray[np.int64],
    records: NDArray[np.int64],
    room: NDArray[np.int64],
    control: NDArray[np.int64],
) -> bool:
    """Look at one page; whether it is to be looked at again."""
    page = heap[index, 0]
    if traced[page] == 0:
        return False
    got = native.pread(pagemap, room[2:].ctypes.data, 8, heap[index, 1] // 4096 * 8)
    if got != 8:
        control[FAILED] = -got if got < 0 else -_ESRCH
        return False
    now = native.monotonic_ns(room)
    control[LOOKS] += 1
    if room[2] & PRESENT_ENTRY:
        if heap[index, 3] == heap[index, 2]:
            control[AT_ONCE] += 1
        write = -1
        if control[PROTECTED]:
            write = 0 if room[2] & WRITE_PROTECTED_ENTRY else 1
        note(traced, state, records, page, heap[index, 3], now, follow(clock, seen, now, room), write)
        return False
    heap[index, 3] = now
    return True


@njit(
    "void(int32, int32, int32, int32, int64[::1], int64[::1], int64[:, ::1], uint8[::1], int64[::1], int64[:, ::1])",
    cache=True,
    nogil=True,
)
def look(
    ask: int,
    reply: int,
    pagemap: int,
    clock: int,
    seen: NDArray[np.int64],
    control: NDArray[np.int64],
    fresh: NDArray[np.int64],
    traced: NDArray[np.uint8],
    state: NDArray[np.int64],
    records: NDArray[np.int64],
) -> None:
    """Look at the watched pages until told to stop.

    :param clock: with ``seen``, the guest's :class:`~outboard.trace.running.Running`.
    :param fresh: rows to watch from now on: page, address, zapped at.
    :param traced: with ``state`` and ``records``, the arrays of a :class:`~outboard.pages.traps.TrapRing`; a page whose
        flag is clear is watched no longer.
    """
    room = np.zeros(3, dtype=np.int64)
    word = np.ones(1, dtype=np.int64)
    waiting = np.zeros(1, dtype=np.int64)
    # A struct pollfd: the descriptor, POLLIN.
    waiting[0] = ask | 1 << 32
    heap = np.empty((1024, 4), dtype=np.int64)
    size = 0
    while True:
        timeout = _IDLE_NS
        if size:
            timeout = max(0, _due(heap, 0) - native.monotonic_ns(room))
        if native.ppoll(waiting.ctypes.data, 1, timeout, room) > 0:
            native.read(ask, word.ctypes.data, 8)
            if control[ASKED] == STOP:
                return
            if control[ASKED] == WATCH:
                rows = control[ROWS]
                while size + rows > heap.shape[0]:
                    grown = np.empty((2 * heap.shape[0], 4), dtype=np.int64)
                    grown[:size] = heap[:size]
                    heap = grown
                for row in range(rows):
                    heap[size, :3] = fresh[row]
                    heap[size, 3] = fresh[row, 2]
                    if _still_waits(pagemap, clock, seen, heap, size, traced, state, records, room, control):
                        size += 1
                        _rise(heap, size - 1)
            else:
                kept = 0
                for index in range(size):
                    if _still_waits(pagemap, clock, seen, heap, index, traced, state, records, room, control):
                        heap[kept] = heap[index]
                        kept += 1
                size = kept
                for index in range(size // 2 - 1, -1, -1):
                    _sink(heap, size, index)
            control[HEAP] = heap.size * 8
            word[0] = 1
            native.write(reply, word.ctypes.data, 8)
        now = native.monotonic_ns(room)
        follow(clock, seen, now, room)
        soon = now + _AT_LEAST_NS // 2
        for _ in range(256):
            if size == 0 or _due(heap, 0) > soon:
                break
            if not _still_waits(pagemap, clock, seen, heap, 0, traced, state, records, room, control):
                size -= 1
                heap[0] = heap[size]
            _sink(heap, size, 0)
        if control[FAILED]:
            size = 0


@njit(
    "int64(int32, int64, int64, int64[::1])",
    cache=True,
    nogil=True,
)
def _map(uffd: int, start: int, length: int, argument: NDArray[np.int64]) -> int:
    """Map a page that is in the file; 0, or the errno to try again or to give up with, negated."""
    argument[0], argument[1], argument[2], argument[3] = start, length, 0, 0
    answer = native.ioctl(uffd, _CONTINUE, argument.ctypes.data)
    if answer >= 0 or answer in (_EAGAIN, _ESRCH):
        return min(answer, 0)
    # Mapped by somebody else since (EEXIST), or gone from the file: its thread shall look again.
    native.ioctl(uffd, _WAKE, argument.ctypes.data)
    return 0


@njit(
    "void(int32, int32, int32, int32, int64[::1], int64[::1], int64[:, ::1], uint8[::1], int64[::1], int64[:, ::1])",
    cache=True,
    nogil=True,
)
def answer(
    ask: int,
    reply: int,
    uffd: int,
    clock: int,
    seen: NDArray[np.int64],
    control: NDArray[np.int64],
    regions: NDArray[np.int64],
    traced: NDArray[np.uint8],
    state: NDArray[np.int64],
    records: NDArray[np.int64],
) -> None:
    """Answer the minor faults of ``uffd`` until told to stop.

    :param clock: with ``seen``, the guest's :class:`~outboard.trace.running.Running`.
    :param regions: rows: address, length, first page number, bytes of a page.
    :param traced: with ``state`` and ``records``, the arrays of a :class:`~outboard.pages.traps.TrapRing`.
    """
    room = np.zeros(2, dtype=np.int64)
    word = np.ones(1, dtype=np.int64)
    waiting = np.zeros(2, dtype=np.int64)
    argument = np.zeros(4, dtype=np.int64)
    # struct uffd_msg: the event in the lowest byte, flags, address, thread.
    messages = np.zeros((_MESSAGES, 4), dtype=np.int64)
    # Faults that could not be answered yet, as the address space was changing.
    late = np.zeros((_MESSAGES, 2), dtype=np.int64)
    lates = 0
    while True:
        waiting[0], waiting[1] = ask | 1 << 32, uffd | 1 << 32
        native.ppoll(waiting.ctypes.data, 2, 100_000 if lates else _IDLE_NS, room)
        if waiting[0] >> 48:
            native.read(ask, word.ctypes.data, 8)
            if control[ASKED] == STOP:
                return
            word[0] = 1
            native.write(reply, word.ctypes.data, 8)
        kept = 0
        for index in range(lates):
            if _map(uffd, late[index, 0], late[index, 1], argument) == _EAGAIN:
                late[kept] = late[index]
                kept += 1
        lates = kept
        got = native.read(uffd, messages.ctypes.data, 32 * (_MESSAGES - lates)) if lates < _MESSAGES else 0
        now = native.monotonic_ns(room)
        run = follow(clock, seen, now, room) if got > 0 else 0
        for index in range(max(0, got) // 32):
            if messages[index, 0] & 255 != _PAGEFAULT or not messages[index, 1] & _MINOR:
                continue
            address = messages[index, 2]
            for row in range(regions.shape[0]):
                inside = address - regions[row, 0]
                if 0 <= inside < regions[row, 1]:
                    size = regions[row, 3]
                    inside = inside // size * size
                    # Noted before it is answered: whoever sees the access done finds it noted.
                    page = regions[row, 2] + inside // 4096
                    note(traced, state, records, page, now, now, run, messages[index, 1] & _WRITE)
                    control[FAULTS] += 1
                    if _map(uffd, regions[row, 0] + inside, size, argument) == _EAGAIN:
                        late[lates, 0], late[lates, 1] = regions[row, 0] + inside, size
                        lates += 1
