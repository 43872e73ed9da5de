"""Zapping: taking pages out of a process's page tables while their content stays in the file.

The next access to such a page is a fault, by which it is noticed. Two ways, of which :func:`open_zap` takes the one
that does no harm here:

============  ==========================  =======================================================================
``pageout``   process_madvise(2),         From outside. On shared memory without swap the kernel drops the entries
              MADV_PAGEOUT (Linux 5.10)   and keeps the pages; with swap it would write them there, and large pages
                                          of hugetlbfs are refused. 11 us a page, most of it the other processors'
                                          TLBs; 0.7 us in a run.
``dontneed``  madvise(2) MADV_DONTNEED,   Any shared mapping. One thread that runs no vCPU is stopped for 0.3 ms and
              injected                    1.3 us for each run.
============  ==========================  =======================================================================

MADV_PAGEOUT leaves alone what it cannot unmap, and does not say so: a page that another process maps too, and one that
has just come in and is still in a processor's batch of 31 for the LRU lists. So each page is looked at once more.
"""

from __future__ import annotations

import errno
import mmap
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import cpuclock, native, pidfd, proc, ptrace
from outboard.linux.pagemap import PRESENT_ENTRY, Pagemap
from outboard.linux.process_madvise import Advice
from outboard.linux.userfaultfd import UFFDIO_WRITEPROTECT, Userfaultfd
from outboard.pages import PAGE_SIZE
from outboard.trace.running import Running, ran
from outboard.vmm.guest import Guest

Moments = NDArray[np.int64]
"""Shape (n, 2): CLOCK_MONOTONIC and the guest's processor time, in nanoseconds, for each of n pages."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where pages lie in a process, by page: ``addresses``; and the spans that they make: ``spans``, of shape (m, 2),
    address and length in bytes; ``span``, the index of each page's."""

    addresses: NDArray[np.int64]
    spans: NDArray[np.int64]
    span: NDArray[np.int64]


_SYS_MADVISE = 28
_TOGETHER = 8
"""Pages zapped in one call: those that are touched before they have been looked at count as not zapped."""
_PAGEOUT, _PROTECT, _ESRCH = int(Advice.PAGEOUT), UFFDIO_WRITEPROTECT.number, -errno.ESRCH


class Zap(Protocol):
    """A way of zapping."""

    name: str

    def __call__(self, places: Places, protect: Userfaultfd | None) -> Moments:
        """Zap pages, one span after the other; when each was done, 0 for those that are mapped yet.

        :param protect: write-protect what was zapped with this, at once.
        :raise KernelError: the kernel refused; ESRCH or ENOENT when the process has ended.
        """
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


@njit(
    "int64(int32, int32, int32, int32, int64[::1], int64[::1], int64[::1], int64[:, ::1])",
    cache=True,
    nogil=True,
)
def _pageout(
    process: int,
    pagemap: int,
    uffd: int,
    clock: int,
    seen: NDArray[np.int64],
    addresses: NDArray[np.int64],
    span: NDArray[np.int64],
    done: Moments,
) -> int:
    room = np.empty(2, dtype=np.int64)
    argument = np.empty(3, dtype=np.int64)
    entry = np.empty(1, dtype=np.int64)
    argument[2] = 1
    index = 0
    while index < addresses.shape[0]:
        end = index + 1
        while end < min(addresses.shape[0], index + _TOGETHER) and span[end] == span[index]:
            end += 1
        # A struct iovec, and the front of a struct uffdio_writeprotect.
        argument[0], argument[1] = addresses[index], (end - index) * PAGE_SIZE
        answer = native.process_madvise(process, argument.ctypes.data, 1, _PAGEOUT)
        if answer < 0:
            return answer
        now = native.monotonic_ns(room)
        run = ran(clock, seen, now, room)
        while index < end:
            answer = native.pread(pagemap, entry.ctypes.data, 8, addresses[index] // PAGE_SIZE * 8)
            if answer != 8:
                return min(answer, _ESRCH)
            if not entry[0] & PRESENT_ENTRY:
                done[index, 0], done[index, 1] = now, run
            index += 1
        if uffd >= 0:
            answer = native.ioctl(uffd, _PROTECT, argument.ctypes.data)
            if answer < 0:
                return answer
    return 0


class Pageout:
    """MADV_PAGEOUT from outside."""

    name = "pageout"

    def __init__(self, guest: Guest, running: Running) -> None:
        self._pid = guest.pid
        self._running = running
        self._pagemap = Pagemap(guest.pid)
        self._process = pidfd.open(guest.pid)

    def __call__(self, places: Places, protect: Userfaultfd | None) -> Moments:
        done: Moments = np.zeros((len(places.addresses), 2), dtype=np.int64)
        fd = -1 if protect is None else protect.fileno()
        answer = _pageout(
            self._process,
            self._pagemap.fileno(),
            fd,
            self._running.clock,
            self._running.seen,
            places.addresses,
            places.span,
            done,
        )
        if answer < 0:
            raise KernelError(f"process_madvise(PAGEOUT) of process {self._pid}, or write-protecting it", -answer)
        return done

    def close(self) -> None:
        if self._process >= 0:
            pidfd.close(self._process)
            self._process = -1
            self._pagemap.close()


class Dontneed:
    """MADV_DONTNEED by the process itself."""

    name = "dontneed"

    def __init__(self, guest: Guest, running: Running) -> None:
        self._guest = guest
        self._running = running

    def __call__(self, places: Places, protect: Userfaultfd | None) -> Moments:
        calls: NDArray[np.int64] = np.zeros((len(places.spans), 7), dtype=np.int64)
        calls[:, 0], calls[:, 1:3], calls[:, 3] = _SYS_MADVISE, places.spans, mmap.MADV_DONTNEED
        began = (time.monotonic_ns(), cpuclock.read(self._running.clock))
        with ptrace.Stopped(self._guest.pid, self._guest.emulator_thread()) as target:
            refused = target.batch(calls)
        if refused.any():
            operation = f"madvise(DONTNEED) in process {self._guest.pid}"
            raise KernelError(operation, -int(refused[refused != 0][0]))
        if protect is not None:
            for start, length in places.spans.tolist():
                protect.write_protect(start, length)
        # Some were done earlier in the batch than others: an access must not seem to come before its page was zapped.
        return np.full((len(places.addresses), 2), began, dtype=np.int64)

    def close(self) -> None:
        pass


def open_zap(guest: Guest, running: Running) -> Zap:
    """The way that suits this guest and this machine.

    :raise KernelError: the process has ended.
    """
    large = any(region.page_size != PAGE_SIZE for region in guest.regions)
    return Dontneed(guest, running) if large or proc.meminfo()["SwapTotal"] else Pageout(guest, running)


def places_of(guest: Guest, pages: NDArray[np.int64]) -> Places:
    """Where ``pages`` lie; ascending, and in large-page memory the first of each large page."""
    addresses: NDArray[np.int64] = np.empty(len(pages), dtype=np.int64)
    sizes: NDArray[np.int64] = np.empty(len(pages), dtype=np.int64)
    for region in guest.regions:
        low, high = np.searchsorted(pages, (region.first, region.first + region.pages))
        addresses[low:high] = region.hva + (pages[low:high] - region.first) * PAGE_SIZE
        sizes[low:high] = region.page_size
    opens: NDArray[np.bool_] = np.ones(len(pages), dtype=np.bool_)
    opens[1:] = addresses[1:] != addresses[:-1] + sizes[:-1]
    starts = np.flatnonzero(opens)
    lengths = np.add.reduceat(sizes, starts) if len(starts) else sizes
    return Places(addresses, np.column_stack((addresses[starts], lengths)), np.cumsum(opens) - 1)


def heads(guest: Guest, pages: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pages that can be zapped alone: the first page of each large page that holds one of ``pages``."""
    if all(region.page_size == PAGE_SIZE for region in guest.regions):
        return pages
    found: list[Any] = []
    for region in guest.regions:
        low, high = np.searchsorted(pages, (region.first, region.first + region.pages))
        per = region.page_size // PAGE_SIZE
        found.append(np.unique((pages[low:high] - region.first) // per * per + region.first))
    return np.concatenate(found)
