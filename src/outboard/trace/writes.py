"""The write trace: which pages of a running guest were written since we last asked.

Three back ends answer the same question; :func:`open_write_trace` takes the first that the kernel offers.

=============  ==========================  ==============================================================
``pagemap``    PAGEMAP_SCAN and            The kernel notes writes by itself; asking re-arms in the same
               UFFD_FEATURE_WP_ASYNC       walk of the page tables. 1 to 5 ms for 512 MiB (Linux 6.7).
``messages``   UFFDIO_WRITEPROTECT         The first write to a page waits until a thread of ours has noted
               (Linux 5.19 for shmem)      it: the writer pays 10 to 20 us a page and round. Coarse, it pays
                                           that for eight pages of a block of 2 MiB, and the block is told
                                           of whole.
``soft-dirty`` /proc/PID/clear_refs        Reading and clearing are two steps, so the whole VMM is stopped
                                           by SIGSTOP for the milliseconds between them.
=============  ==========================  ==============================================================

A trace belongs to one mapping of the memory: writes by another process that maps the same file are not seen, which is
why guests with vhost-user back ends are refused at attach. Source: userfaultfd(2), Documentation/admin-guide/mm/
pagemap.rst and soft-dirty.rst.
"""

from __future__ import annotations

import select
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import RefusedError
from outboard.linux import pagemap, pidfd, proc
from outboard.linux.pagemap import Category, Pagemap
from outboard.linux.userfaultfd import Fault, FaultFlag, Features, Mode, available_features
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs, shifted
from outboard.trace.writers import blocks_around, watch_writers
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest, Region

_NEAR = LARGE
"""Pages: ranges to look at are rounded to 2 MiB, so that one walk covers neighbours."""
_STRETCH = 16384
"""Pages: 64 MiB, of which there are few enough in any guest to ask the file about each."""
_DENSE = 8
"""Writes to different pages of one block after which a coarse trace lets all of it be: the writer has waited for 100 us
by then, and to look at 2 MiB takes whoever refines the trace a third of a millisecond."""


@dataclass(frozen=True, slots=True)
class WriteTraceStatistics:
    """What a trace has done so far; times in nanoseconds."""

    backend: str
    armed_ns: int
    collections: int
    pages: int
    collecting_ns: int


class WriteTrace(ABC):
    """A trace over all of a guest's memory, armed from the start.

    Synchronization: one thread uses a trace; the guest runs on meanwhile.
    """

    backend: str

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._armed_ns = self._collections = self._pages = self._collecting_ns = 0

    @abstractmethod
    def _scan(self, region: Region, start: int, end: int, *, rearm: bool) -> Runs:
        """Pages of ``region`` between HVA ``start`` and ``end`` that were written, as runs of page numbers."""

    @abstractmethod
    def close(self) -> None:
        """Disarm and leave the guest as it was. Idempotent."""

    def writers(self, among: PageSet, seconds: float) -> Counter[int]:
        """Which threads are met writing to some of ``among``, and how often; none where that cannot be told.

        :param seconds: for how long to look at most; the pages looked at count as written.
        :raise RefusedError, KernelError: as :func:`~outboard.trace.writers.watch_writers`.
        """
        del among, seconds
        return Counter()

    def collect(self, within: PageSet | None = None) -> PageSet:
        """Take the pages written since the last call and trace them again.

        :param within: look only at these pages and their neighbours; what is found among neighbours is in the answer,
            since it is no longer noted afterwards.
        :raise KernelError: the kernel refused; a dead VMM is ESRCH.
        """
        began = time.monotonic_ns()
        written = self._walk(within, rearm=True)
        self._collections += 1
        self._pages += len(written)
        self._collecting_ns += time.monotonic_ns() - began
        return written

    def peek(self, within: PageSet | None = None) -> PageSet:
        """The pages written since the last :meth:`collect`, left for the next one to take; errors and ``within`` as
        there."""
        return self._walk(within, rearm=False)

    def _walk(self, within: PageSet | None, *, rearm: bool) -> PageSet:
        written = PageSet(self._guest.pages)
        for region in self._guest.regions:
            for start, end in self._spans(region, within):
                written.add(self._scan(region, start, end, rearm=rearm))
        return written

    def statistics(self) -> WriteTraceStatistics:
        """A frozen snapshot."""
        return WriteTraceStatistics(self.backend, self._armed_ns, self._collections, self._pages, self._collecting_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @staticmethod
    def _spans(region: Region, within: PageSet | None) -> list[tuple[int, int]]:
        if within is None:
            return [(region.hva, region.hva + region.pages * PAGE_SIZE)]
        runs = within.widened(_NEAR).runs()
        low = np.maximum(runs[:, 0], region.first) - region.first
        high = np.minimum(runs[:, 0] + runs[:, 1] - region.first, region.pages)
        return [
            (region.hva + first * PAGE_SIZE, region.hva + end * PAGE_SIZE)
            for first, end in zip(low.tolist(), high.tolist(), strict=True)
            if first < end
        ]


def _page_runs(region: Region, ranges: NDArray[np.uint64]) -> Runs:
    """Turn (start, end, ...) byte ranges of HVA into runs of page numbers."""
    start = (ranges[:, 0].astype(np.int64) - region.hva) // PAGE_SIZE + region.first
    end = (ranges[:, 1].astype(np.int64) - region.hva) // PAGE_SIZE + region.first
    return np.column_stack((start, end - start))


class _Registered(WriteTrace):
    """What the two userfaultfd back ends share."""

    def __init__(self, guest: Guest, features: Features) -> None:
        super().__init__(guest)
        self._clamp = Clamp.inject(guest, features, Mode.WP, outlives_us=False)

    def close(self) -> None:
        self._clamp.release()


class PagemapTrace(_Registered):
    """The asynchronous back end: no message, no thread, no stop.

    Where the guest's file has no memory in all of 64 MiB nothing is armed: that there is some, later, is what tells of
    a write. So a trace costs, and its page tables take, what the guest has used, however much it may.
    """

    backend = "pagemap"

    def __init__(self, guest: Guest) -> None:
        super().__init__(
            guest,
            Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.WP_UNPOPULATED | Features.WP_ASYNC,
        )
        self._pagemap = Pagemap(guest.pid)
        self._owed = PageSet(guest.pages)
        self._unarmed = PageSet(guest.pages)
        began = time.monotonic_ns()
        if all(region.has_file for region in guest.regions):
            self._unarmed = ~guest.memory.populated().widened(_STRETCH)
        super()._walk(~self._unarmed, rearm=True)
        self._armed_ns = time.monotonic_ns() - began

    def writers(self, among: PageSet, seconds: float) -> Counter[int]:
        blocks = blocks_around(self._guest, among)
        if not blocks:
            return Counter()
        # Opened before: while they are registered apart, the mapping is several.
        with Guest(self._guest.name, self._guest.pid, blocks, self._guest.vcpus) as part:
            for block in blocks:
                self._clamp.uffd.unregister(block.hva, block.pages * PAGE_SIZE)
            try:
                return watch_writers(part, seconds)
            finally:
                for block in blocks:
                    end = block.hva + block.pages * PAGE_SIZE
                    self._clamp.uffd.register(block.hva, block.pages * PAGE_SIZE, Mode.WP)
                    self._owed.add(self._scan(block, block.hva, end, rearm=True))
                    self._owed.add(np.array([[block.first, block.pages]], dtype=np.int64))

    def _walk(self, within: PageSet | None, *, rearm: bool) -> PageSet:
        armed = ~self._unarmed
        written = super()._walk(armed if within is None else within & armed, rearm=rearm) | self._owed
        new = self._guest.memory.populated(self._unarmed if within is None else within & self._unarmed)
        if rearm:
            self._owed = PageSet(self._guest.pages)
            if new:
                stretches = new.widened(_STRETCH)
                super()._walk(stretches, rearm=True)
                self._unarmed -= stretches
                # What comes to be there before that is armed, and only that, is told of now.
                new = self._guest.memory.populated(stretches)
        return written | new

    def _scan(self, region: Region, start: int, end: int, *, rearm: bool) -> Runs:
        ranges = self._pagemap.scan(
            start, end, required=Category.WRITTEN, report=Category.WRITTEN, protect=rearm, check_async=rearm
        )
        return _page_runs(region, ranges)

    def close(self) -> None:
        super().close()
        self._pagemap.close()


class MessageTrace(_Registered):
    """The synchronous back end: a thread notes each first write and lets the writer go on.

    :param coarse: tell of blocks of 2 MiB that are written densely as a whole.
    """

    backend = "messages"

    def __init__(self, guest: Guest, *, coarse: bool = False) -> None:
        super().__init__(guest, Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.THREAD_ID)
        self.delay_s = 0.0
        """How much longer each first write to a page waits, which slows down whoever writes and nobody else."""
        self._writers: Counter[int] = Counter()
        self._written: NDArray[np.bool_] = np.zeros(guest.pages, dtype=np.bool_)
        self._dense = _DENSE if coarse else LARGE + 1
        # A page is noted and unprotected, or taken and protected, never half of each.
        self._taking = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="write-trace", daemon=True)
        self._thread.start()
        began = time.monotonic_ns()
        for region in guest.regions:
            self._protect(region, region.first, region.pages, protect=True)
        self._armed_ns = time.monotonic_ns() - began

    def _protect(self, region: Region, first: int, count: int, *, protect: bool) -> None:
        start = region.hva + (first - region.first) * PAGE_SIZE
        self._clamp.uffd.write_protect(start, count * PAGE_SIZE, protect)

    def _serve(self) -> None:
        uffd = self._clamp.uffd
        poll = select.poll()
        poll.register(uffd.fileno(), select.POLLIN)
        # Those that wait longer, in the order in which they came.
        waiting: deque[tuple[float, int]] = deque()
        while not self._ending.is_set():
            patience = min(50.0, max(0.0, waiting[0][0] - time.monotonic()) * 1000) if waiting else 50.0
            # In milliseconds, whole ones: the rest is slept.
            if poll.poll(int(patience)):
                for message in uffd.read():
                    if isinstance(message, Fault) and message.flags & FaultFlag.WP:
                        self._writers[message.thread] += 1
                        waiting.append((time.monotonic() + self.delay_s, message.address))
            elif 0 < patience < 1:
                time.sleep(patience / 1000)
            while waiting and (waiting[0][0] <= time.monotonic() or not self.delay_s):
                self._note(waiting.popleft()[1])

    def _note(self, address: int) -> None:
        """A page is written to: let it be."""
        for region in self._guest.regions:
            if region.hva <= address < region.hva + region.pages * PAGE_SIZE:
                per = region.page_size // PAGE_SIZE
                first = region.first + (address - region.hva) // region.page_size * per
                low = region.first + (first - region.first) // LARGE * LARGE
                block = slice(low, min(low + LARGE, region.first + region.pages))
                with self._taking:
                    self._written[first : first + per] = True
                    if np.count_nonzero(self._written[block]) < self._dense:
                        self._protect(region, first, per, protect=False)
                    else:
                        self._written[block] = True
                        self._protect(region, low, block.stop - low, protect=False)

    def writers(self, among: PageSet, seconds: float) -> Counter[int]:
        """As they were met since the trace was armed: every first write tells of its thread."""
        del among, seconds
        return self._writers.copy()

    def _scan(self, region: Region, start: int, end: int, *, rearm: bool) -> Runs:
        first = region.first + (start - region.hva) // PAGE_SIZE
        last = region.first + (end - region.hva) // PAGE_SIZE
        with self._taking:
            runs = shifted(PageSet.from_mask(self._written[first:last]).runs(), first)
            for run_first, count in runs.tolist() if rearm else ():
                self._written[run_first : run_first + count] = False
                self._protect(region, run_first, count, protect=True)
        return runs

    def close(self) -> None:
        # Whoever comes to wait after the thread has ended is woken by the unregistration.
        self._ending.set()
        self._thread.join()
        super().close()


class SoftDirtyTrace(WriteTrace):
    """The oldest back end: stops the VMM while it reads and clears."""

    backend = "soft-dirty"

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest)
        self._pagemap = Pagemap(guest.pid)
        began = time.monotonic_ns()
        pagemap.clear_soft_dirty(guest.pid)
        self._armed_ns = time.monotonic_ns() - began

    def collect(self, within: PageSet | None = None) -> PageSet:
        del within  # clear_refs forgets every page, so every page is asked
        handle = pidfd.open(self._guest.pid)
        try:
            pidfd.send_signal(handle, signal.SIGSTOP)
            try:
                proc.wait_stopped(self._guest.pid)
                written = super().collect(None)
                pagemap.clear_soft_dirty(self._guest.pid)
            finally:
                pidfd.send_signal(handle, signal.SIGCONT)
        finally:
            pidfd.close(handle)
        return written

    def _scan(self, region: Region, start: int, end: int, *, rearm: bool) -> Runs:
        del rearm  # all at once, in collect
        entries = self._pagemap.entries(start, (end - start) // PAGE_SIZE)
        first = region.first + (start - region.hva) // PAGE_SIZE
        dirty: NDArray[np.bool_] = (entries & np.uint64(pagemap.SOFT_DIRTY_ENTRY)) != 0
        return shifted(PageSet.from_mask(dirty).runs(), first)

    def close(self) -> None:
        self._pagemap.close()


def traces_pages() -> bool:
    """Whether this kernel's best back end tells of pages as they are mapped, even if a coarse one would do."""
    features = available_features()
    return Features.WP_ASYNC in features and Features.WP_UNPOPULATED in features and pagemap.has_pagemap_scan()


def open_write_trace(guest: Guest, *, coarse: bool = False) -> WriteTrace:
    """Arm a write trace over all of ``guest``'s memory with the best back end this kernel has.

    :param coarse: where a writer would pay for each page, tell of blocks that are written densely as a whole.
    :raise RefusedError: ``write-trace``: the kernel has none of the three; ``uffd-taken``: another userfaultfd holds
        the memory.
    :raise KernelError: injection or registration failed.
    """
    if traces_pages():
        return PagemapTrace(guest)
    if Features.WP_HUGETLBFS_SHMEM in available_features():
        return MessageTrace(guest, coarse=coarse)
    if pagemap.has_soft_dirty():
        return SoftDirtyTrace(guest)
    raise RefusedError(
        "write-trace",
        "tracing writes needs PAGEMAP_SCAN with UFFD_FEATURE_WP_ASYNC (Linux 6.7), UFFD_FEATURE_WP_HUGETLBFS_SHMEM "
        "(Linux 5.19) or soft-dirty pages (CONFIG_MEM_SOFT_DIRTY), and this kernel has none of them; "
        "use --post-copy, which needs no trace",
    )
