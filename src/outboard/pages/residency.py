"""Residency: where each page of a guest is.

One byte a page in memory that the engine's processes share. The pager is its only writer. Two writers may meet on one
page (the answer to a fault and the bulk): both then write RESIDENT, and the kernel has decided whose content stands.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from outboard.pages.pageset import PageSet
from outboard.pages.shared import shared_array


class Where(IntEnum):
    """Where a page lives."""

    PEER = 0
    """Absent here; its content is at the peer."""
    RESIDENT = 1
    """In this host's memory."""
    ZERO = 2
    """Absent and known to read as zeros: no memory is spent until it is touched."""


class Residency:
    """Where each of ``pages`` pages is; all at the peer at first.

    ``where`` is the live array (uint8, one a page) that hot loops index.

    Synchronization: bytes are stored whole; made before the processes that share it are forked.
    """

    __slots__ = ("pages", "where")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.where: NDArray[np.uint8] = shared_array(pages, np.uint8)

    def pages_at(self, where: Where) -> PageSet:
        """The pages that are at ``where`` now."""
        return PageSet.from_mask(self.where == where)

    def count(self, where: Where) -> int:
        """How many pages are at ``where`` now."""
        return int(np.count_nonzero(self.where == where))
