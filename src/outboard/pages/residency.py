"""Residency: where each page of a guest is.

Two arrays in memory that processes share: ``where`` (one byte a page) and ``locator`` (eight, what the store calls the
page). Mapped from a file on tmpfs they are the journal that an engine leaves to its successor: a store into a shared
mapping is kept by the kernel at once, whatever becomes of the process.

Why no page is lost, at whichever instruction the engine dies. The pager keeps to two orders.

* Going: the page is write-protected and read; the store holds it; ``leaving`` says so; ``locator`` and ``where`` name
  the store; only then its memory is punched out of the guest's file; only then ``leaving`` is over.
* Coming back: UFFDIO_COPY enters it in the file, whole or not at all; only then ``where`` says RESIDENT; only then the
  store may use the slot for another page.

So at every instant one of two holds. The page is in the guest's file: then that is its content, whatever ``where``
says, for it was write-protected since it was read, or has been entered from the store. Or it is not in the file: then
it was punched, hence ``where`` and ``locator`` name the store, and the store still holds it, since it lets go only of
pages that ``where`` calls RESIDENT; or it was never in the file, ``where`` still says RESIDENT, and it reads as zeros.
The successor finds out which by asking the file: *what is present is the truth, what is absent is where the journal
says.* It makes the journal agree, lifts every write-protection, and wakes every thread that waits, which then asks
again. Each of these steps can be repeated, so dying in the middle of them is the same case.

One thing is between the two: of a large page that somebody holds on to the kernel cannot punch a part, and fills it
with zeros that are present (Linux mm/truncate.c). The pager punches again until it is absent, or else puts the page
back. A successor that finds a page ``leaving``, named as a store's, and zeros in the file, does the same: the page held
something else, or it would be at ZERO.

The one thing that must not happen is that a page appears in the file by other means while it is away; every way for the
guest to touch its memory ends in the userfaultfd, and a manager must never do so itself.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.pages.labels import any_labelled, count, labelled
from outboard.pages.pageset import PageSet
from outboard.pages.shared import file_array, shared_array


class Where(IntEnum):
    """Where a page lives."""

    PEER = 0
    """Absent here; its content is at the peer."""
    RESIDENT = 1
    """In this host's memory; if the file has no page there it was never written and reads as zeros."""
    ZERO = 2
    """Absent and known to read as zeros: no memory is spent until it is touched."""
    POOL = 3
    """In the pool: memory of this host that guests share."""
    FILE = 4
    """In a swap file."""
    DISK = 5
    """On a disk of the VM, which held it already: the locator names image and block."""
    SNAPSHOT = 6
    """In the snapshot that the guest was restored from."""
    SHARED = 7
    """Mapped from a sharing pool, where ``locator`` is its slot; or copied from there by a write (pager/overlay.py)."""


STORED = (Where.POOL, Where.FILE, Where.DISK, Where.SNAPSHOT)
"""Where ``locator`` says more."""


class Residency:
    """Where each of ``pages`` pages is.

    In anonymous memory, or in the directory ``journal``. At first all are at the peer if the guest is ``arriving``, and
    resident otherwise.
    ``where`` (uint8) and ``locator`` (uint64) are the live arrays that hot loops index; ``leaving`` (uint8) is 1 for
    pages that are being punched.

    :raise OutboardError: the journal is another number of pages'.
    :raise KernelError: it cannot be mapped.

    Synchronization: bytes and words are stored whole. Two writers may meet on one page of a guest that arrives (the
    answer to a fault and the bulk): both then write RESIDENT, and the kernel has decided whose content stands.
    """

    __slots__ = ("leaving", "locator", "pages", "where")

    def __init__(self, pages: int, journal: Path | None = None, *, arriving: bool = False) -> None:
        self.pages = pages
        self.where: NDArray[np.uint8]
        self.locator: NDArray[np.uint64]
        self.leaving: NDArray[np.uint8]
        if journal is None:
            self.where = shared_array(pages, np.uint8)
            self.locator = shared_array(pages, np.uint64)
            self.leaving = shared_array(pages, np.uint8)
        else:
            self.locator = file_array(journal / "locator", pages, np.uint64)
            self.leaving = file_array(journal / "leaving", pages, np.uint8)
            self.where = file_array(journal / "where", pages, np.uint8)
        # Nothing has gone anywhere before every entry of a new journal says RESIDENT; dying here leaves PEER, which a
        # guest that does not arrive never has.
        if not arriving:
            self.where[self.where == Where.PEER] = Where.RESIDENT

    def went(self, pages: NDArray[np.int64], where: Where, locators: NDArray[np.uint64]) -> None:
        """Note that pages are in a store, before their memory is given up."""
        self.locator[pages] = locators
        self.where[pages] = where

    def returned(self, pages: NDArray[np.int64]) -> None:
        """Note that pages are in the guest's file again, before the store lets go of them."""
        self.where[pages] = Where.RESIDENT

    def pages_at(self, where: Where) -> PageSet:
        """The pages that are at ``where`` now."""
        return labelled(self.where, where)

    def count(self, where: Where) -> int:
        """How many pages are at ``where`` now."""
        return count(self.where, where)

    def any_at(self, where: Where, among: PageSet) -> bool:
        """Whether one of ``among`` is at ``where`` now."""
        return any_labelled(self.where, among, where)
