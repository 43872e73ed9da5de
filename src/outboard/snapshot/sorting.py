"""What becomes of each page of a snapshot, compiled: zeros, the parent's, a page that was met before, or a new one.

Pages are the same when 128 bits of seeded digests are. The seed is drawn for each chain and known to this host alone:
whoever writes a guest's memory cannot look for two pages that are taken for one another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.pages.content import keyed_digest
from outboard.stores.snapshot_format import CHUNK_PAGES, SLOT_BITS, Kind

_ZERO, _HERE, _PARENT = int(Kind.ZERO), int(Kind.HERE), int(Kind.PARENT)
_I8, _U8, _U1 = types.int64[::1], types.uint64[::1], types.uint8[::1]
_U82 = types.uint64[:, ::1]


class Known(NamedTuple):
    """Pages met so far: an open-addressed table of digests, and of places plus one (0 is empty)."""

    digests: NDArray[np.uint64]
    places: NDArray[np.uint64]


KNOWN = types.NamedTuple((_U82, _U8), Known)  # type: ignore[no-untyped-call]


def known(room: int) -> Known:
    """A table with room for ``room`` pages; its memory is taken as it fills."""
    size = 1 << max(4, (2 * room - 1).bit_length())
    return Known(np.zeros((size, 2), dtype=np.uint64), np.zeros(size, dtype=np.uint64))


@njit(
    types.int64(_I8, _U1, types.boolean[::1], types.uint64, KNOWN, _U1, _U8, _U82, _U1, _U82, _I8, _I8),
    cache=True,
    nogil=True,
)
def sort_out(
    numbers: NDArray[np.int64],
    content: NDArray[np.uint8],
    zero: NDArray[np.bool_],
    seed: int,
    met: Known,
    kinds: NDArray[np.uint8],
    places: NDArray[np.uint64],
    digests: NDArray[np.uint64],
    parent_kinds: NDArray[np.uint8],
    parent_digests: NDArray[np.uint64],
    opened: NDArray[np.int64],
    fresh: NDArray[np.int64],
) -> int:
    """Say of each page of ``numbers``, whose content follows one another, what it is.

    :param kinds, places, digests: of the table that is being made, by page; :param parent_kinds: empty without one.
    :param opened: the chunk that takes new pages, how many it has, and the number of the next chunk.
    :param fresh: takes the indices of the pages that are new. :return: how many those are.
    """
    count = 0
    mask = met.places.size - 1
    for index in range(numbers.size):
        page = numbers[index]
        if zero[index]:
            kinds[page] = _ZERO
            continue
        address = content.ctypes.data + index * PAGE_SIZE
        low, high = keyed_digest(address, PAGE_SIZE, seed), keyed_digest(address, PAGE_SIZE, int(~np.uint64(seed)))
        digests[page, 0], digests[page, 1] = low, high
        if (
            parent_kinds.size
            and parent_kinds[page] != _ZERO
            and parent_digests[page, 0] == low
            and parent_digests[page, 1] == high
        ):
            kinds[page] = _PARENT
            continue
        kinds[page] = _HERE
        at = np.int64(low & np.uint64(mask))
        while met.places[at] != 0 and not (met.digests[at, 0] == low and met.digests[at, 1] == high):
            at = (at + 1) & mask
        if met.places[at] == 0:
            if opened[1] == CHUNK_PAGES or opened[0] < 0:
                opened[0], opened[1] = opened[2], 0
                opened[2] += 1
            met.digests[at, 0], met.digests[at, 1] = low, high
            met.places[at] = np.uint64((opened[0] << SLOT_BITS | opened[1]) + 1)
            opened[1] += 1
            fresh[count] = index
            count += 1
        places[page] = met.places[at] - np.uint64(1)
    return count
