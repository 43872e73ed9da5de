"""Which pages were touched since the last look, and which of them were written: a cheap trace of all pages at once.

Each look drops the mappings of what was touched; whoever touches a page again has the kernel map it, for 5 to 10 us,
and nobody is woken. One access a page and look is seen, so looks follow one another at various distances, and how many
of them a page was touched in tells how hot it is.

The memory is registered with a userfaultfd that protects nothing, since else the kernel would map the neighbours
of a page that is read. Where writes are to be told from reads it does protect what has been dropped, asynchronously.
Memory in large pages is looked at by large page, and registered for neither. What a pager holds is registered already.

Source: process_madvise(2), userfaultfd(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import RefusedError
from outboard.linux import pidfd, proc, process_madvise
from outboard.linux.pagemap import WRITE_PROTECTED_ENTRY, Pagemap
from outboard.linux.process_madvise import Advice
from outboard.linux.userfaultfd import Features, Mode, available_features
from outboard.pages import PAGE_SIZE
from outboard.trace.accesses import exclude_others, held_by_a_pager
from outboard.trace.running import Running
from outboard.trace.zap import Dontneed, places_of
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest

_PLAIN = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
_WRITES = _PLAIN | Features.WP_UNPOPULATED | Features.WP_ASYNC
_ENTRIES = 1 << 18
"""Entries of a pagemap to read at once."""


class Touched(NamedTuple):
    """The first pages of the units that were touched, ascending; ``written``: those of them that were written to, where
    that is known."""

    pages: NDArray[np.int64]
    written: NDArray[np.int64] | None


class TouchTrace:
    """A trace over all of a guest's memory; what is touched from now on is seen.

    :param per: pages that are looked at as one: 512 where memory is in large pages.
    :param writes: tell writes from reads.
    :raise RefusedError: ``traced``: a trace runs already; ``uffd-taken``; ``no-write-trace``: writes cannot be told.
    :raise KernelError: the process has ended; injection or registration failed.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest, per: int = 1, *, writes: bool = False) -> None:
        self._guest, self._per = guest, per
        if writes and (per > 1 or available_features() & _WRITES != _WRITES):
            raise RefusedError(
                "no-write-trace",
                f"{guest.name}: which pages are written cannot be told: that takes UFFD_FEATURE_WP_ASYNC (Linux 6.7) "
                "and memory in small pages",
            )
        self._writes = writes
        self._armed: NDArray[np.bool_] = np.zeros(-(-guest.pages // per), dtype=np.bool_)
        self._clamp: Clamp | None = None
        self._process = -1
        self._pagemap = Pagemap(guest.pid)
        try:
            exclude_others(guest, self._pagemap)
            self._process = pidfd.open(guest.pid)
            self._clamp = self._hold()
            self._arm(np.arange(self._armed.size, dtype=np.int64))
        except BaseException:
            self.close()
            raise

    def _hold(self) -> Clamp | None:
        features = _WRITES if self._writes else _PLAIN
        if self._per > 1 or available_features() & features != features:
            return None
        try:
            return Clamp.inject(self._guest, features, Mode.WP, outlives_us=False)
        except RefusedError as error:
            if error.reason != "uffd-taken" or self._writes or not held_by_a_pager(self._guest):
                raise
            return None

    def _entries(self) -> NDArray[np.int64]:
        """The page table's entries of all of the guest's pages."""
        found: NDArray[np.int64] = np.empty(self._guest.pages, dtype=np.int64)
        for region in self._guest.regions:
            for first in range(0, region.pages, _ENTRIES):
                count = min(_ENTRIES, region.pages - first)
                at = region.first + first
                found[at : at + count] = self._pagemap.entries(region.hva + first * PAGE_SIZE, count).view(np.int64)
        return found

    def _by_unit(self, pages: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if self._per == 1:
            return pages
        starts = np.arange(0, pages.size, self._per)
        return np.logical_or.reduceat(pages, starts)

    def _arm(self, units: NDArray[np.int64]) -> None:
        """Drop the mappings of units, and note which are gone."""
        if not units.size:
            return
        pages = units
        if self._per > 1:
            pages = (units[:, None] * self._per + np.arange(self._per)).reshape(-1)
            pages = pages[pages < self._guest.pages]
        places = places_of(self._guest, pages)
        if self._per > 1 or proc.meminfo()["SwapTotal"]:
            # The kernel would write the pages to swap, or split the large ones.
            Dontneed(self._guest, Running(self._guest.pid))(places, None)
        else:
            process_madvise.advise(self._process, places.spans.view(np.uint64), Advice.PAGEOUT)
        if self._writes and self._clamp is not None:
            for start, length in places.spans.tolist():
                self._clamp.uffd.write_protect(start, length)
        self._armed[units] = True
        # What another processor has just taken in cannot be dropped, and says nothing until it can.
        self._armed &= ~self._by_unit(self._entries() < 0)

    def look(self) -> Touched:
        """What was touched since the last look, and look again from now on.

        :raise KernelError: the process has ended.
        """
        entries = self._entries()
        present = entries < 0
        there = self._by_unit(present)
        units = np.flatnonzero(there & self._armed)
        written = None
        if self._writes:
            written = np.flatnonzero(present & self._armed & (entries & WRITE_PROTECTED_ENTRY == 0))
        # Those that could not be dropped before are tried again.
        self._arm(np.flatnonzero(there))
        return Touched(units * self._per, written)

    def close(self) -> None:
        """Leave the guest as it was, but for the mappings, which come back when they are needed. Idempotent."""
        if self._clamp is not None:
            self._clamp.release()
            self._clamp = None
        if self._process >= 0:
            pidfd.close(self._process)
            self._process = -1
        self._pagemap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
