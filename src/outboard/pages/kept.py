"""Pages kept by both ends of a stream, so that a page with the same content can be told by a number.

The end that sends decides: it looks each page up by its digest, compares every byte, and either names the slot that
holds the same or puts the page there, and says so. The other end does what it is told, in the same order, and so holds
the same in every slot that it is told of.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests

PLAIN, KEEP, RECALL = 1, 2, 3
"""What is to be done for a page: take it from the content; the same, and keep it; take it from its slot."""

_WORDS = PAGE_SIZE // 8
_RECEIVED = types.Array(types.uint64, 2, "C", readonly=True)
_ROWS, _U8, _U2, _U1 = types.uint64[:, ::1], types.uint64[::1], types.uint16[::1], types.uint8[::1]


@njit(types.void(_ROWS, _U8, _U8, _ROWS, _U2, types.boolean[::1]), cache=True, nogil=True)
def _meet(
    pages: NDArray[np.uint64],
    digests: NDArray[np.uint64],
    tags: NDArray[np.uint64],
    store: NDArray[np.uint64],
    slots: NDArray[np.uint16],
    same: NDArray[np.bool_],
) -> None:
    for index in range(pages.shape[0]):
        tag = digests[index] | np.uint64(1)
        slot = (digests[index] >> np.uint64(32)) % np.uint64(store.shape[0])
        equal = tags[slot] == tag
        if equal:
            for word in range(_WORDS):
                if store[slot, word] != pages[index, word]:
                    equal = False
                    break
        if not equal:
            tags[slot] = tag
            for word in range(_WORDS):
                store[slot, word] = pages[index, word]
        slots[index] = slot
        same[index] = equal


@njit(types.int64(_U1, _U2, _RECEIVED, _U1, _ROWS, _ROWS), cache=True, nogil=True)
def _follow(
    orders: NDArray[np.uint8],
    slots: NDArray[np.uint16],
    content: NDArray[np.uint64],
    held: NDArray[np.uint8],
    store: NDArray[np.uint64],
    out: NDArray[np.uint64],
) -> int:
    row = told = 0
    for index in range(orders.size):
        order = orders[index]
        if order in (PLAIN, KEEP):
            for word in range(_WORDS):
                out[index, word] = content[row, word]
            row += 1
        if order == KEEP:
            slot = slots[told]
            held[slot] = 1
            for word in range(_WORDS):
                store[slot, word] = out[index, word]
        elif order == RECALL:
            slot = slots[told]
            if not held[slot]:
                return int(slot)
            for word in range(_WORDS):
                out[index, word] = store[slot, word]
        if order in (KEEP, RECALL):
            told += 1
    return -1


class KeptPages:
    """One end's pages. It takes memory, 4 KiB a slot, as far as it is used.

    :param slots: how many, at most 65,536; the same at both ends.

    Synchronization: one thread.
    """

    def __init__(self, slots: int) -> None:
        self._store: NDArray[np.uint64] = np.zeros((slots, _WORDS), dtype=np.uint64)
        self._tags: NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)
        self._held: NDArray[np.uint8] = np.zeros(slots, dtype=np.uint8)

    def meet(self, pages: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Look pages up, and keep those that are not there; for the end that sends.

        :param pages: a row of PAGE_SIZE bytes each, contiguous.
        :return: the slot of each page, and whether it was there.
        """
        count = len(pages)
        slots, same = np.empty(count, dtype=np.uint16), np.empty(count, dtype=np.bool_)
        digests = page_digests(pages.reshape(-1))
        _meet(pages.view(np.uint64), digests, self._tags, self._store, slots, same)
        return slots, same

    def follow(
        self, orders: NDArray[np.uint8], slots: NDArray[np.uint16], content: NDArray[np.uint8], out: NDArray[np.uint8]
    ) -> int | None:
        """Do what the end that sends has decided.

        :param orders: for each page PLAIN, KEEP, RECALL, or what passes it over.
        :param slots: for each page of KEEP and RECALL; all below the number of slots.
        :param content: of the pages of PLAIN and KEEP, a row each. :param out: a row for each page.
        :return: a slot that was to be recalled and holds nothing; None: all is done.
        """
        rows = np.ascontiguousarray(content).view(np.uint64)
        empty = _follow(orders, slots, rows, self._held, self._store, out.view(np.uint64))
        return None if empty < 0 else empty
