"""Pages saved before they change, compiled: what the fault path does while an image of the memory is being taken.

Memory is write-protected a little ahead of the instant, while the guest runs, so that it need not stand still for that;
what is written in between (*early*, then *written*) is protected again at the instant, and is not much.

From the instant on, every page is *pending* and write-protected, or absent. Whoever comes to a pending page first saves
it, holding the claim on it: the fault path, so that whoever faulted goes on as soon as this one page is out of the way,
or the background, which goes through all of them. Saved pages wait in a ring in memory, and in a file once that is
full; a page is saved once, so that neither can grow beyond the guest.

Saving can fail (the disk of that file). The guest goes first: it is let go on, the page is given up, and with it the
image: ``state[FAILURE]`` says so.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.linux import native
from outboard.pager.batches import row_of
from outboard.pages import PAGE_SIZE
from outboard.pages.shared import publish


class Word(IntEnum):
    """Words of ``state``."""

    RECORDS = 0
    """Pages saved so far by the fault path."""
    HEAD = 1
    """Pages put into the ring so far."""
    TAIL = 2
    """Pages taken from it; the background's word, the others are the fault path's."""
    SPILLED = 3
    """Pages in the file."""
    FAILURE = 4
    """An errno: the image is lost."""
    SPILL = 5
    """The file."""
    SIZE = 6


NOT_PENDING, PENDING, EARLY, WRITTEN = range(4)
"""Values of ``pending``."""
ZERO_PLACE = -1
"""Where a page of zeros is; what lies in the file begins below."""


class Saving(NamedTuple):
    """What is being saved: ``pending`` by page; ``records`` (page, place) of what was saved, in the order of that."""

    pending: NDArray[np.uint8]
    ring: NDArray[np.uint8]
    records: NDArray[np.int64]
    state: NDArray[np.int64]


_I8, _U1, _ROWS = types.int64[::1], types.uint8[::1], types.int64[:, ::1]
SAVING = types.NamedTuple((_U1, _U1, _ROWS, _I8), Saving)  # type: ignore[no-untyped-call]
_RECORDS, _HEAD, _TAIL, _SPILLED, _FAILURE, _SPILL = (int(word) for word in Word if word is not Word.SIZE)
_EIO = errno.EIO


def nothing() -> Saving:
    """While no image is being taken."""
    none = np.empty(0, dtype=np.uint8)
    return Saving(none, none, np.empty((0, 2), dtype=np.int64), np.zeros(Word.SIZE, dtype=np.int64))


def begin(pages: int, ring: int, spill: int) -> Saving:
    """All pages are early; ``ring`` pages of memory are taken as they are needed, then the file ``spill``."""
    state = np.zeros(Word.SIZE, dtype=np.int64)
    state[Word.SPILL] = spill
    return Saving(
        np.full(pages, EARLY, dtype=np.uint8),
        np.zeros(min(ring, pages) * PAGE_SIZE, dtype=np.uint8),
        np.zeros((pages, 2), dtype=np.int64),
        state,
    )


@njit(types.boolean(SAVING, types.int64), cache=True, nogil=True)
def is_pending(saving: Saving, page: int) -> bool:
    """Whether an image is being taken and does not have a page yet."""
    return saving.pending.size > 0 and saving.pending[page] != NOT_PENDING


@njit(types.boolean(SAVING, types.int64), cache=True, nogil=True)
def must_save(saving: Saving, page: int) -> bool:
    """Whether a page is to be saved before it changes; one that changes early is noted."""
    if not is_pending(saving, page):
        return False
    if saving.pending[page] == PENDING:
        return True
    saving.pending[page] = WRITTEN
    return False


@njit(types.void(SAVING, types.int64, types.int64), cache=True, nogil=True)
def _note(saving: Saving, page: int, place: int) -> None:
    at = saving.state[_RECORDS]
    saving.records[at, 0], saving.records[at, 1] = page, place
    saving.pending[page] = NOT_PENDING
    publish(saving.state, _RECORDS, at + 1)  # type: ignore[call-arg]  # numba passes one


@njit(types.void(SAVING, types.int64), cache=True, nogil=True)
def save_zeros(saving: Saving, page: int) -> None:
    """Save a page that reads as zeros."""
    _note(saving, page, ZERO_PLACE)


@njit(types.void(SAVING, types.int64, _U1, types.int64), cache=True, nogil=True)
def save(saving: Saving, page: int, content: NDArray[np.uint8], at: int) -> None:
    """Save a page whose content is in ``content`` from byte ``at`` on."""
    state = saving.state
    room = saving.ring.size // PAGE_SIZE
    if state[_HEAD] - state[_TAIL] < room:
        slot = state[_HEAD] % room
        saving.ring[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE] = content[at : at + PAGE_SIZE]
        state[_HEAD] += 1
        _note(saving, page, slot)
        return
    number = state[_SPILLED]
    done = native.pwrite(state[_SPILL], content.ctypes.data + at, PAGE_SIZE, number * PAGE_SIZE)
    if done != PAGE_SIZE:
        state[_FAILURE] = -done if done < 0 else _EIO
        saving.pending[page] = NOT_PENDING
        return
    state[_SPILLED] += 1
    _note(saving, page, ZERO_PLACE - 1 - number)


@njit(types.void(SAVING, types.int64, _ROWS, _U1), cache=True, nogil=True)
def save_from_file(saving: Saving, page: int, regions: NDArray[np.int64], staging: NDArray[np.uint8]) -> None:
    """Save a page that is in the guest's file."""
    row = row_of(regions, page)
    offset = regions[row, 3] + (page - regions[row, 0]) * PAGE_SIZE
    done = native.pread(regions[row, 4], staging.ctypes.data, PAGE_SIZE, offset)
    if done != PAGE_SIZE:
        saving.state[_FAILURE] = -done if done < 0 else _EIO
        saving.pending[page] = NOT_PENDING
        return
    save(saving, page, staging, 0)
