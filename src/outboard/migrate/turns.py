"""Whose turn it is: the runs of pages of a rank that nobody has sent, by one compiled walk over the outbox's labels.

Eight pages at a time are passed over where none has a turn or all were sent. The ranks stand still meanwhile; what is
sent by others during the walk may be in it or not, since whoever sends claims first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages import LARGE
from outboard.pages.labels import Labels, words
from outboard.pages.pageset import Runs

NEVER = 255
"""The rank of a page that is not sent: the guest holds it free, or it has no memory."""

_ROOM = 4096
_NO_ROOM = np.empty((0, 2), dtype=np.int64)
_ALL_NEVER, _ALL_SENT = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0x0101010101010101)
_U1, _U8, _I8, _ROWS, _COUNTS = types.uint8[::1], types.uint64[::1], types.int64, types.int64[:, ::1], types.int64[::1]


@njit(types.void(_ROWS, _COUNTS, _I8, _I8, _I8, _I8, _I8), cache=True, nogil=True, inline="always")
def _note(out: Runs, found: NDArray[np.int64], first: int, count: int, turn: int, most: int, wanted: int) -> None:
    """Count a run whose rank is at most ``most``; write down those of the rank that is wanted, as far as they fit."""
    if turn <= most:
        if turn == wanted and found[turn] < out.shape[0]:
            out[found[turn], 0], out[found[turn], 1] = first, count
        found[turn] += 1


@njit(types.void(_U1, _U8, _U1, _U8, _I8, _I8, _I8, _I8, _I8, _I8, _ROWS, _COUNTS), cache=True, nogil=True)
def _walk(
    rank: Labels,
    ranks: NDArray[np.uint64],
    sent: Labels,
    sents: NDArray[np.uint64],
    page: int,
    end: int,
    number: int,
    of: int,
    most: int,
    wanted: int,
    out: Runs,
    found: NDArray[np.int64],
) -> None:
    while page < end:
        edge = end
        if of > 1:
            block = page // LARGE
            edge = min(end, (block + 1) * LARGE)
            if block % of != number:
                page = edge
                continue
        while page < edge:
            word = page >> 3
            if page & 7 == 0 and page + 8 <= edge and (ranks[word] == _ALL_NEVER or sents[word] == _ALL_SENT):
                page += 8
                continue
            begin, turn = page, rank[page]
            if sent[page]:
                page += 1
                continue
            while page < edge and rank[page] == turn and not sent[page]:
                page += 1
            _note(out, found, begin, page - begin, turn, most, wanted)


@njit(types.void(_U1, _U1, _I8, _I8, _I8, _I8, types.boolean, _I8, _I8, _I8, _ROWS, _COUNTS), cache=True, nogil=True)
def _walk_large(
    rank: Labels,
    sent: Labels,
    page: int,
    end: int,
    number: int,
    of: int,
    parts: bool,
    unit: int,
    most: int,
    wanted: int,
    out: Runs,
    found: NDArray[np.int64],
) -> None:
    while page < end:
        first, page = page, page + unit
        if of > 1 and first // LARGE % of != number:
            continue
        least, gone = NEVER, 0
        for one in range(first, page):
            least = min(least, int(rank[one]))
            gone |= int(sent[one])
        if not (gone if parts else sent[first]):
            _note(out, found, first, unit, least, most, wanted)
            continue
        one = first
        while parts and one < page:
            begin, turn = one, rank[one]
            if sent[one]:
                one += 1
                continue
            while one < page and rank[one] == turn and not sent[one]:
                one += 1
            _note(out, found, begin, one - begin, turn, most, wanted)


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk over the pages ``[first, end)``.

    :ivar unit: pages that go whole the first time: 1, or those of a large page. :ivar parts: parts of large pages too.
    :ivar share: every so-many-th stretch of 2 MiB: which, and of how many.
    """

    rank: Labels
    sent: Labels
    unit: int
    first: int
    end: int
    share: tuple[int, int]
    parts: bool

    def ranks(self, upto: int) -> list[int]:
        """Which ranks up to ``upto`` have pages due, ascending."""
        return np.flatnonzero(self._walk(upto, NEVER, _NO_ROOM)).tolist()

    def runs(self, rank: int) -> Runs:
        """The runs of pages due of ``rank``, ascending."""
        out: Runs = np.empty((_ROOM, 2), dtype=np.int64)
        found = int(self._walk(rank, rank, out)[rank])
        if found > out.shape[0]:
            out = np.empty((found, 2), dtype=np.int64)
            found = min(found, int(self._walk(rank, rank, out)[rank]))
        return out[:found]

    def _walk(self, most: int, wanted: int, out: Runs) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.zeros(NEVER + 1, dtype=np.int64)
        rank, sent, unit = self.rank, self.sent, self.unit
        if unit == 1:
            _walk(rank, words(rank), sent, words(sent), self.first, self.end, *self.share, most, wanted, out, found)
        else:
            low, high = self.first // unit * unit, min(rank.size, -(-self.end // unit) * unit)
            _walk_large(rank, sent, low, high, *self.share, self.parts, unit, most, wanted, out, found)
        return found
