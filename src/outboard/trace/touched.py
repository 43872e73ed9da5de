"""Which pages were touched within a time, and which of them were written: a cheap trace of many pages at once.

Mappings are dropped; whoever touches a page has the kernel map it again, for 5 to 10 us, and nobody is woken; then the
page tables are looked at. One access a page is seen, so how many of several times, long and short ones, it was touched
in tells how hot it is.

The memory is registered with a userfaultfd that protects nothing, since else the kernel would map the neighbours
of a page that is read. Where writes are to be told from reads it does protect what has been dropped, asynchronously.
Memory in large pages is looked at by large page, and registered for neither. What a pager holds is registered already.

Source: process_madvise(2), userfaultfd(2), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError
from outboard.linux import numa, pidfd, proc, process_madvise
from outboard.linux.pagemap import WRITE_PROTECTED_ENTRY, Pagemap
from outboard.linux.process_madvise import Advice
from outboard.linux.userfaultfd import Features, Mode, available_features
from outboard.pages import PAGE_SIZE
from outboard.trace.accesses import exclude_others, held_by_a_pager
from outboard.trace.running import Running
from outboard.trace.zap import Dontneed, heads, places_of
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
    """A trace over a guest's memory, in which nothing is armed at first.

    :param per: pages that are looked at as one: 512 where memory is in large pages.
    :param writes: tell writes from reads.
    :ivar stops: arming stops the process for a moment.
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
        self.units = -(-guest.pages // per)
        self._armed: NDArray[np.bool_] = np.zeros(self.units, dtype=np.bool_)
        # The kernel would write the pages to swap, or split the large ones, if they were dropped from outside.
        self._inject = Dontneed(guest, Running(guest.pid)) if per > 1 or proc.meminfo()["SwapTotal"] else None
        self.stops = self._inject is not None
        self._clamp: Clamp | None = None
        self._process = -1
        self._pagemap = Pagemap(guest.pid)
        try:
            exclude_others(guest, self._pagemap)
            self._process = pidfd.open(guest.pid)
            # What a processor has just taken in cannot be dropped until it gives that up, as for a move of no page.
            with contextlib.suppress(KernelError):
                numa.move_pages(guest.pid, np.zeros(1, dtype=np.int64), 0)
            self._clamp = self._hold()
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

    def _pages(self, first: int, count: int) -> tuple[int, int]:
        """The pages of ``count`` units from ``first`` on: the first, and the one after the last."""
        return first * self._per, min((first + count) * self._per, self._guest.pages)

    def _entries(self, low: int, high: int) -> NDArray[np.int64]:
        """The page tables' entries of some pages."""
        found: NDArray[np.int64] = np.empty(high - low, dtype=np.int64)
        for region in self._guest.regions:
            end = min(high, region.first + region.pages)
            for at in range(max(low, region.first), end, _ENTRIES):
                count = min(_ENTRIES, end - at)
                address = region.hva + (at - region.first) * PAGE_SIZE
                found[at - low : at - low + count] = self._pagemap.entries(address, count).view(np.int64)
        return found

    def _by_unit(self, pages: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if self._per == 1:
            return pages
        return np.logical_or.reduceat(pages, np.arange(0, pages.size, self._per))

    def arm(self, first: int, count: int) -> None:
        """Drop the mappings of ``count`` units from ``first`` on: who touches them from now on is seen.

        :raise KernelError: the process has ended.
        """
        low, high = self._pages(first, count)
        spans = [
            (
                region.hva + (max(low, region.first) - region.first) * PAGE_SIZE,
                (end - max(low, region.first)) * PAGE_SIZE,
            )
            for region in self._guest.regions
            if (end := min(high, region.first + region.pages)) > max(low, region.first)
        ]
        if self._inject:
            places = places_of(self._guest, heads(self._guest, np.arange(low, high, dtype=np.int64)))
            self._inject(places, None)
        else:
            process_madvise.advise(self._process, spans, Advice.PAGEOUT)
        if self._writes and self._clamp is not None:
            for start, length in spans:
                self._clamp.uffd.write_protect(start, length)
        # What is mapped already was touched since: the hottest pages are, before anybody can look.
        self._armed[first : first + count] = True

    def seen(self, first: int, count: int) -> Touched:
        """What was touched of ``count`` units from ``first`` on since they were armed.

        :raise KernelError: the process has ended.
        """
        low, high = self._pages(first, count)
        entries = self._entries(low, high)
        armed = self._armed[first : first + count]
        there = self._by_unit(entries < 0) & armed
        written = None
        if self._writes:
            written = np.flatnonzero((entries < 0) & armed & (entries & WRITE_PROTECTED_ENTRY == 0)) + low
        return Touched((np.flatnonzero(there) + first) * self._per, written)

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
