"""The exact LRU stack of Mattson, Gecsei, Slutz and Traiger (1970): the truth that a miss-rate curve is judged by."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit("int64[::1](int32[::1], int64, int64)", cache=True, nogil=True)
def distances(accesses: NDArray[np.int32], pages: int, since: int) -> NDArray[np.int64]:
    """How many of ``accesses[since:]`` had each stack distance: at index d, those that hit in d pages and not in d - 1;
    at index 0, the first accesses ever to their pages.

    A Fenwick tree over time marks the last access to each page; time is cut anew when the tree is full.
    """
    size = 1
    while size < 4 * pages:
        size *= 2
    tree = np.zeros(size + 1, dtype=np.int32)
    last = np.zeros(pages, dtype=np.int64)
    found = np.zeros(pages + 1, dtype=np.int64)
    now = 0
    alive = 0
    for index in range(accesses.shape[0]):
        if now == size:
            # Number the last accesses anew, in their order.
            order = np.argsort(last)
            tree[:] = 0
            now = 0
            for at in range(pages):
                page = order[at]
                if last[page]:
                    now += 1
                    last[page] = now
                    place = now
                    while place <= size:
                        tree[place] += 1
                        place += place & -place
        page = accesses[index]
        distance = 0
        if last[page]:
            before = 0
            place = last[page]
            while place > 0:
                before += tree[place]
                place -= place & -place
            distance = alive - before + 1
            place = last[page]
            while place <= size:
                tree[place] -= 1
                place += place & -place
        else:
            alive += 1
        if index >= since:
            found[distance] += 1
        now += 1
        last[page] = now
        place = now
        while place <= size:
            tree[place] += 1
            place += place & -place
    return found


def misses(accesses: NDArray[np.int32], pages: int, since: int, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of ``accesses[since:]`` miss in an LRU memory of each size, which all of ``accesses`` have filled."""
    found = distances(np.ascontiguousarray(accesses, dtype=np.int32), pages, since)
    hits = np.cumsum(found[1:])
    whole = np.minimum(np.floor(sizes).astype(np.int64), pages)
    missed: NDArray[np.float64] = np.where(whole > 0, found.sum() - hits[np.maximum(whole, 1) - 1], found.sum()) * 1.0
    return missed
