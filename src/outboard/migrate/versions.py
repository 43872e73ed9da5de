"""The versions of pages that were sent last, so that a page that is sent again goes as what has changed of it.

Before the resume the destination's memory holds what was sent last, for its guest does not run. The source keeps that
too, of VERSIONS pages on all streams together, 64 MiB, each at the place that its number says. A page that is sent
again takes that place from one that was sent once: who writes to it will write to it again.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages import LARGE, PAGE_SIZE

VERSIONS = 16384
UNKNOWN = -1
_WORDS = PAGE_SIZE // 8
_ROWS, _I8, _U1 = types.uint64[:, ::1], types.int64[::1], types.uint8[::1]


@njit(types.void(_I8, _I8, _ROWS, _I8, _U1, _ROWS, _ROWS, _I8), cache=True, nogil=True)
def _compare(
    numbers: NDArray[np.int64],
    places: NDArray[np.int64],
    pages: NDArray[np.uint64],
    owner: NDArray[np.int64],
    sent: NDArray[np.uint8],
    store: NDArray[np.uint64],
    changes: NDArray[np.uint64],
    changed: NDArray[np.int64],
) -> None:
    for index in range(numbers.size):
        page, place = numbers[index], places[index]
        changed[index] = UNKNOWN
        if owner[place] == page:
            count = 0
            for word in range(_WORDS):
                change = store[place, word] ^ pages[index, word]
                changes[index, word] = change
                count += change != 0
            changed[index] = count
        if owner[place] == page or owner[place] < 0 or sent[page]:
            owner[place] = page
            for word in range(_WORDS):
                store[place, word] = pages[index, word]
        sent[page] = 1


class Versions:
    """Of one stream.

    :param pages: how many the guest has. :param of: how many streams there are.

    Synchronization: one thread.
    """

    def __init__(self, pages: int, of: int = 1) -> None:
        self._of, places = of, VERSIONS // of
        self._owner: NDArray[np.int64] = np.full(places, -1, dtype=np.int64)
        self._sent: NDArray[np.uint8] = np.zeros(pages, dtype=np.uint8)
        self._store: NDArray[np.uint64] = np.zeros((places, _WORDS), dtype=np.uint64)

    def replace(
        self, numbers: NDArray[np.int64], pages: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Put in what is sent now.

        :param pages: a row of PAGE_SIZE bytes each, contiguous.
        :return: for each page how many of its 8-byte words have changed, UNKNOWN where that is not known; and the
            exclusive-or of both versions where it is.
        """
        changed, changes = np.empty(numbers.size, dtype=np.int64), np.empty_like(pages)
        _compare(
            numbers,
            self._places(numbers),
            pages.view(np.uint64),
            self._owner,
            self._sent,
            self._store,
            changes.view(np.uint64),
            changed,
        )
        return changed, changes

    def _places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        # Of a stream's pages, which are so many large ones apart, neighbours lie side by side.
        own: NDArray[np.int64] = numbers // (LARGE * self._of) * LARGE + numbers % LARGE
        return own % self._owner.size

    def drop(self, numbers: NDArray[np.int64]) -> None:
        """Forget pages: they were sent in another way."""
        places = self._places(numbers)
        self._owner[places[self._owner[places] == numbers]] = -1
        self._sent[numbers] = 1
