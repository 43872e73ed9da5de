"""What the serving of faults looks up and notes: arrays that it shares with whoever moves pages, for compiled code."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from outboard.pager.saving import SAVING, Saving
from outboard.pages.residency import Where
from outboard.stores import snapshot

LENDER = int(max(Where)) + 1
"""In ``files``, behind the stores: who lends units to the swap file."""


class Reason(IntEnum):
    """Why :func:`serve` came back; ``State`` has the details."""

    COMMAND = 0
    EVENT = 1
    """The address space changes: kind, first, second, third, and whose."""
    GONE = 2
    """An address space has ended: whose."""
    DAMAGED = 3
    """A page was poisoned: its number."""
    FAILED = 4
    """A request failed: errno, page."""


class State(IntEnum):
    """Words that :func:`serve` keeps between two calls."""

    AT = 0
    COUNT = 1
    SPACE = 2
    RETRIES = 3
    DETAIL = 4
    """Five words."""
    SIZE = 9


class Count(IntEnum):
    """Counters of faults, by how they were answered."""

    POOL = 0
    FILE = 1
    ZERO = 2
    MINOR = 3
    WP = 4
    LEFT = 5
    """Left to whoever had claimed the page."""
    RACED = 6
    AGAIN = 7
    DAMAGED = 8
    DISK = 9
    SNAPSHOT = 10
    SIZE = 11


class Table(NamedTuple):
    """What a fault is looked up in; all of it live.

    ``regions`` (int64, five a row) as in :mod:`outboard.pager.batches`. ``files``: the descriptor of each store, by
    ``Where``, and at ``LENDER`` that of who lends units to the swap file. ``file_lent``: for each unit of the swap
    file, the unit of the lender that stands for it, plus 2; below that it is its own. ``images``: the descriptors of
    disk images, by number; ``disk_digests`` and ``known`` by page, the latter 1 while nobody has written to a page that
    a disk is known to hold. ``rows`` and ``unpacking``: the snapshot that the guest was restored from. ``saving``: the
    image that is being taken.
    """

    regions: NDArray[np.int64]
    where: NDArray[np.uint8]
    locator: NDArray[np.uint64]
    claimed: NDArray[np.uint8]
    files: NDArray[np.int32]
    pool_taken: NDArray[np.uint8]
    pool_digests: NDArray[np.uint64]
    file_taken: NDArray[np.uint8]
    file_digests: NDArray[np.uint64]
    file_lent: NDArray[np.int64]
    images: NDArray[np.int32]
    disk_digests: NDArray[np.uint64]
    known: NDArray[np.uint8]
    rows: snapshot.Rows
    unpacking: snapshot.Desk
    saving: Saving


class Desk(NamedTuple):
    """What serving works with and keeps between two calls; ``counts`` and ``histogram`` are read by others."""

    messages: NDArray[np.uint64]
    polled: NDArray[np.uint64]
    retries: NDArray[np.int64]
    staging: NDArray[np.uint8]
    room: NDArray[np.int64]
    state: NDArray[np.int64]
    counts: NDArray[np.int64]
    histogram: NDArray[np.uint64]


REGIONS = types.int64[:, ::1]
_I4, _I8, _U1, _U8 = types.int32[::1], types.int64[::1], types.uint8[::1], types.uint64[::1]
TABLE = types.NamedTuple(  # type: ignore[no-untyped-call]
    (REGIONS, _U1, _U8, _U1, _I4, _U1, _U8, _U1, _U8, _I8, _I4, _U8, _U1, snapshot.ROWS, snapshot.DESK, SAVING), Table
)
DESK = types.NamedTuple(  # type: ignore[no-untyped-call]
    (_U8, _U8, types.int64[:, ::1], _U1, _I8, _I8, _I8, _U8), Desk
)
