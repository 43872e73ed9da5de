"""The sharing overlay: pages of a guest that are mapped from a pool, one copy for many, and copied when written.

Sharing a page, while the guest runs: it is write-protected, read, and compared byte for byte with the pool's copy; the
journal says SHARED; a hand inside the VMM maps the pool over it (mmap(2), MAP_PRIVATE|MAP_FIXED); the new mapping is
registered with the userfaultfd; then the page is punched out of the guest's file, which frees its memory. Reads go to
the pool's frame, a write makes the kernel copy it, for this process alone. Un-sharing is the reverse: the page is
write-protected, what it holds (the pool's content, or the private copy) is written to the guest's file, and the file is
mapped over it again as it was.

Why nothing is lost, at whichever instruction the engine dies: *for a page that the journal calls SHARED, the mapping is
the truth.* If it is the pool's, the content is what the process sees there, and whatever the guest's file holds is
old. If it is the guest's own, the file holds the page: it is punched only after the pool was mapped, and written before
it is mapped again. A successor asks /proc/PID/maps which of the two it is (:mod:`outboard.pager.mappings`), makes the
journal and the file agree, and registers the mappings; that can be repeated. The hand, if it was in the middle of its
order, finishes it first. The journal calls a page SHARED before the pool is mapped and until it no longer is, so
whatever a process maps of a pool is in its journal: a slot that no journal names is free.

A mapping that differs from its neighbour's is one more for the process, of max_map_count that it may have. The first
page of a region is never shared: by its mapping a successor finds the guest's file.

Source: mmap(2), ioctl_userfaultfd(2), proc(5), Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError
from outboard.linux import numa, proc, statfs
from outboard.linux.hand import Hand
from outboard.linux.pagemap import Pagemap
from outboard.linux.ptrace import SYS_mmap, SYS_munmap
from outboard.pager import batches
from outboard.pager.keeper import Keeper
from outboard.pager.mappings import advice_of, most_mappings
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Where
from outboard.vmm.guest import Region
from outboard.vmm.large_pages import collapse

_SYS_MADVISE = 28
_FILE_ENTRY, _SWAPPED_ENTRY = np.uint64(1 << 61), np.uint64(1 << 62)
_SWAP_TYPE, _MARKER = np.uint64(31), np.uint64(31)
"""A pagemap entry that says swapped with this type is the mark of a protection: nothing is there."""

Spans = NDArray[np.int64]
"""Shape (n, 3): first page, first slot in the pool, how many of both."""


@dataclass(frozen=True, slots=True)
class OverlayStatistics:
    """``shared``: pages that are mapped from the pool; ``copied`` of them have been written since, and are private.

    ``mappings``: what the process has now, of ``most``; ``differed``: pages refused, for they were not the pool's.
    """

    shared: int
    copied: int
    differed: int
    mappings: int
    most: int


class Overlay:
    """Shares pages of the guest that ``keeper`` keeps, with the pool that ``pool`` is a descriptor of.

    :raise RefusedError: ``forked``: the guest has forked, and its child maps the same memory; ``pool-not-memory``.
    :raise KernelError: no hand could be put into the process.

    Synchronization: the pager's thread. Faults are served meanwhile.
    """

    def __init__(self, keeper: Keeper, pool: int) -> None:
        if keeper.spaces > 1:
            raise RefusedError(
                "forked",
                f"{keeper.guest.name}: a child that it forked maps the same memory, and would not see what is written "
                "to a shared page; share when that has ended",
            )
        if statfs.of(pool).type != statfs.TMPFS_MAGIC:
            raise RefusedError(
                "pool-not-memory",
                f"{keeper.guest.name}: a sharing pool is memory, a file on tmpfs; what is mapped from any other file "
                "cannot be watched",
            )
        self._keeper = keeper
        self._guest = keeper.guest
        self._where, self._locator = keeper.residency.where, keeper.residency.locator
        self._pool = os.dup(pool)
        self._table: NDArray[np.int64] = np.array(
            [[0, os.fstat(pool).st_size // PAGE_SIZE, 0, 0, self._pool]], dtype=np.int64
        )
        self._differed = 0
        self._memory = -1
        self._pagemap = Pagemap(self._guest.pid)
        self._hand: Hand | None = None
        try:
            self._memory = os.open(f"/proc/{self._guest.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            self._hand = Hand(self._guest.pid, self._guest.emulator_thread())
            self._pool_there = self._hand.give(self._pool)
            self._templates = [self._template(self._hand, region) for region in self._guest.regions]
            self._advice = [advice_of(self._guest.pid, region) for region in self._guest.regions]
        except BaseException:
            self.close()
            raise

    def _template(self, hand: Hand, region: Region) -> int:
        """The address of another mapping of all of a region, never touched, from which pieces are copied back.

        The kernel joins mappings again only if they are of one open file, which is the VMM's own.
        """
        length = region.pages * PAGE_SIZE
        # Of a length of 0, the mapping stays and another of the same file is made: mremap(2).
        at = hand.call("mremap", _SYS_MREMAP, region.hva, 0, length, _MAY_MOVE)
        hand.at_end(SYS_munmap, at, length)
        # Whether it is registered like the one it was made from depends on what the userfaultfd was made for.
        self._keeper.clamp.uffd.register(at, length, self._keeper.clamp.mode)
        self._keeper.clamp.uffd.unregister(at, length)
        return at

    def close(self) -> None:
        """Take the hand away, and leave what is shared as it is. Idempotent."""
        if self._hand is not None:
            self._hand.close()
            self._hand = None
        for fd in {self._memory, self._pool} - {-1}:
            os.close(fd)
        self._memory = self._pool = -1
        self._pagemap.close()

    def room(self) -> int:
        """How many more mappings the process may have."""
        return max(0, most_mappings() - len(proc.maps(self._guest.pid)))

    def share(self, spans: Spans) -> PageSet:
        """Share those of the pages that are resident and equal the pool's, byte for byte; which those were.

        ``spans`` come first that shall go first: what would take more mappings than there are is left out. A page that
        is written meanwhile stays as it is.

        :raise KernelError: the kernel refused; every page is where the journal and the mapping say.
        """
        slots: NDArray[np.int64] = np.full(self._guest.pages, -1, dtype=np.int64)
        for first, slot, count in self._affordable(spans).tolist():
            slots[first : first + count] = np.arange(slot, slot + count)
        for region in self._guest.regions:
            slots[region.first] = -1
        done = PageSet(self._guest.pages)
        wanted = PageSet.from_mask(slots >= 0) & self._keeper.residency.pages_at(Where.RESIDENT)
        for claimed in self._keeper.claims(wanted):
            try:
                equal = self._share(claimed, slots[claimed])
            finally:
                self._keeper.give_up(claimed)
            done = done | PageSet.from_numbers(self._guest.pages, equal)
        return done

    def _affordable(self, spans: Spans) -> Spans:
        # Each span is a mapping, and cuts the one around it in two.
        return spans[: self.room() // 2]

    def _share(self, numbers: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        runs = self._keeper.runs_of(numbers)
        equal = np.zeros(numbers.size, dtype=np.bool_)
        self._keeper.protect(runs, True)
        try:
            equal = self._equal(numbers, slots)
        finally:
            # Whatever has happened: nobody waits for a protection that nobody will lift.
            self._keeper.protect(self._keeper.runs_of(numbers[~equal]), False)
        self._differed += int(np.count_nonzero(~equal))
        chosen, places = numbers[equal], slots[equal]
        if not chosen.size:
            return chosen
        self._keeper.residency.went(chosen, Where.SHARED, places.astype(np.uint64))
        with self._in_agreement():
            self._map_pool(chosen, places)
            # What is held keeps its memory, and nobody sees it: it is written over before it is mapped again.
            self._keeper.punch(self._keeper.runs_of(chosen))
        return chosen

    @contextlib.contextmanager
    def _in_agreement(self) -> Iterator[None]:
        """If mappings could not all be made, the journal and the file follow those that were."""
        try:
            yield
        except KernelError:
            self._keeper.follow_mappings()
            raise

    def _equal(self, numbers: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        ours = self._from_file(numbers).view(np.uint64).reshape(numbers.size, -1)
        theirs = self._from_pool(slots).view(np.uint64).reshape(numbers.size, -1)
        found: NDArray[np.bool_] = (ours == theirs).all(axis=1)
        return found

    def _from_file(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        content = np.empty(numbers.size * PAGE_SIZE, dtype=np.uint8)
        _ask("pread of the guest's file", batches.read(self._keeper.regions, self._keeper.runs_of(numbers), content))
        return content

    def _from_pool(self, slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        content = np.empty(slots.size * PAGE_SIZE, dtype=np.uint8)
        runs = np.array([[slots[at], count] for at, count in _rows(slots)], dtype=np.int64).reshape(-1, 2)
        _ask("pread of the sharing pool", batches.read(self._table, runs, content))
        return content

    def _map_pool(self, numbers: NDArray[np.int64], slots: NDArray[np.int64]) -> None:
        calls, pieces = [], []
        for at, count in _rows(numbers, slots):
            for row, first, length in self._pieces(int(numbers[at]), count):
                offset = int(slots[at + first - numbers[at]]) * PAGE_SIZE
                hva = self._hva(row, first)
                flags = mmap.MAP_PRIVATE | _FIXED
                calls.append([SYS_mmap, hva, length * PAGE_SIZE, _READ_WRITE, flags, self._pool_there, offset])
                calls += self._advise(row, hva, length)
                pieces.append((hva, length))
        self._map(calls, pieces)

    def _map_file(self, numbers: NDArray[np.int64]) -> None:
        calls, pieces = [], []
        for at, count in _rows(numbers):
            for row, first, length in self._pieces(int(numbers[at]), count):
                hva = self._hva(row, first)
                template = self._templates[row] + hva - self._guest.regions[row].hva
                calls.append([_SYS_MREMAP, template, 0, length * PAGE_SIZE, _MAY_MOVE | _REMAP_FIXED, hva, 0])
                pieces.append((hva, length))
        self._map(calls, pieces)

    def _map(self, calls: list[list[int]], pieces: list[tuple[int, int]]) -> None:
        if self._hand is None:
            raise ValueError(f"the overlay of {self._guest.name} is closed")
        results = self._hand.batch(np.array(calls, dtype=np.int64))
        clamp = self._keeper.clamp
        # Those that were refused are what they were, and registered.
        for hva, length in pieces:
            clamp.uffd.register(hva, length * PAGE_SIZE, clamp.mode)
        refused = results[results < 0]
        if refused.size:
            raise KernelError(f"mmap in {self._guest.name}, process {self._guest.pid}", -int(refused[0]))

    def _advise(self, row: int, hva: int, length: int) -> list[list[int]]:
        return [[_SYS_MADVISE, hva, length * PAGE_SIZE, advice, 0, 0, 0] for advice in self._advice[row]]

    def _hva(self, row: int, page: int) -> int:
        region = self._guest.regions[row]
        return region.hva + (page - region.first) * PAGE_SIZE

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run at the edges of regions: row, first page, pages."""
        for row, region in enumerate(self._guest.regions):
            low, high = max(first, region.first), min(first + count, region.first + region.pages)
            if low < high:
                yield row, low, high - low

    def unshare(self, pages: PageSet) -> int:
        """Give those of ``pages`` that are shared, or were, memory of their own in the guest's file; how many.

        :raise KernelError: the kernel refused, ENOSPC where there is no memory for them; every page is where the
            journal and the mapping say.
        """
        came = 0
        for claimed in self._keeper.claims(pages & self._keeper.residency.pages_at(Where.SHARED)):
            try:
                self._unshare(claimed)
            finally:
                self._keeper.give_up(claimed)
            came += claimed.size
        return came

    def _unshare(self, numbers: NDArray[np.int64]) -> None:
        runs = self._keeper.runs_of(numbers)
        self._keeper.protect(runs, True)
        try:
            with self._in_agreement():
                self._to_file(runs, self._read(numbers))
                self._map_file(numbers)
        except BaseException:
            self._keeper.protect(runs, False)
            raise
        self._keeper.residency.returned(numbers)

    def _to_file(self, runs: Runs, content: NDArray[np.uint8]) -> None:
        at = 0
        for first, count in runs.tolist():
            self._guest.memory.write(first, content.data[at : at + count * PAGE_SIZE])
            at += count * PAGE_SIZE

    def _read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What shared pages hold, in order."""
        content = self._from_pool(self._locator[numbers].astype(np.int64))
        for index in np.flatnonzero(self._private(numbers)).tolist():
            (row, page, _), *_ = self._pieces(int(numbers[index]), 1)
            part = content.data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            got = os.preadv(self._memory, [part], self._hva(row, page))
            if got != PAGE_SIZE:
                raise KernelError(f"read of page {page} of {self._guest.name} through /proc/PID/mem", errno.EIO)
        return content

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What shared pages hold, in order, while nothing is shared or un-shared; the guest may write meanwhile."""
        return self._read(numbers)

    def _entries(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        found: NDArray[np.uint64] = np.empty(numbers.size, dtype=np.uint64)
        for at, count in _rows(numbers):
            for row, first, length in self._pieces(int(numbers[at]), count):
                begin = at + first - int(numbers[at])
                found[begin : begin + length] = self._pagemap.entries(self._hva(row, first), length)
        return found

    def _private(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pages the process has copied: in memory and not the pool's, or swapped out."""
        entries = self._entries(numbers)
        present = entries.view(np.int64) < 0
        swapped = (entries & _SWAPPED_ENTRY != 0) & (entries & _SWAP_TYPE != _MARKER)
        found: NDArray[np.bool_] = np.where(present, entries & _FILE_ENTRY == 0, swapped)
        return found

    def shared(self) -> PageSet:
        """The pages that are mapped from the pool, written since or not."""
        return self._keeper.residency.pages_at(Where.SHARED)

    def copied(self) -> PageSet:
        """The shared pages that were written since: each is a private copy, and nothing is saved by it any more."""
        numbers = self.shared().numbers()
        return PageSet.from_numbers(self._guest.pages, numbers[self._private(numbers)])

    def drop_zeros(self, pages: PageSet) -> int:
        """Give up those of ``pages`` that are resident and all zeros; how many.

        They need no copy and no mapping: whoever touches one gets zeros.

        :raise KernelError: the kernel refused.
        """
        gone = 0
        for claimed in self._keeper.claims(pages & self._keeper.residency.pages_at(Where.RESIDENT)):
            try:
                runs = self._keeper.runs_of(claimed)
                self._keeper.protect(runs, True)
                zero = np.zeros(claimed.size, dtype=np.bool_)
                try:
                    zero = zero_pages(self._from_file(claimed))
                finally:
                    self._keeper.protect(self._keeper.runs_of(claimed[~zero]), False)
                if zero.any():
                    self._where[claimed[zero]] = Where.ZERO
                    if self._keeper.punch(self._keeper.runs_of(claimed[zero])):
                        gone += int(np.count_nonzero(zero))
                    else:
                        self._where[claimed[zero]] = Where.RESIDENT
            finally:
                self._keeper.give_up(claimed)
        return gone

    def rebuild(self, blocks: PageSet) -> int:
        """Give blocks, aligned 2 MiB each, memory of their own again, in one large page each if the kernel will.

        A block of which a page is in a store, or busy, stays as it is.

        :return: how many are large now.
        :raise KernelError: the kernel refused otherwise.
        """
        rebuilt = 0
        for first in (page for low, count in blocks for page in range(low, low + count, LARGE)):
            block = PageSet.from_runs(self._guest.pages, np.array([[first, LARGE]], dtype=np.int64))
            self.unshare(block)
            for claimed in self._keeper.claims(block, LARGE):
                try:
                    rebuilt += claimed.size == LARGE and self._collapse(block, claimed)
                finally:
                    self._keeper.give_up(claimed)
        return rebuilt

    def _collapse(self, block: PageSet, numbers: NDArray[np.int64]) -> bool:
        """All of the block is claimed: nobody takes a page away, and who faults waits."""
        if not np.isin(self._where[numbers], (Where.RESIDENT, Where.ZERO)).all():
            return False
        clamp, (row, first, count) = self._keeper.clamp, next(self._pieces(int(numbers[0]), LARGE))
        if count != LARGE:
            return False
        hva, length = self._hva(row, first), LARGE * PAGE_SIZE
        # The kernel makes no large page over holes while anything beside them is registered for missing pages, nor of
        # what is registered for write-protection. What is absent here is a page of zeros.
        for page in (block - self._guest.memory.populated()).numbers().tolist():
            clamp.uffd.zeropage(hva + (page - first) * PAGE_SIZE, PAGE_SIZE)
        self._where[numbers] = Where.RESIDENT
        clamp.uffd.unregister(hva, length)
        try:
            return not collapse(self._guest, block)
        finally:
            clamp.uffd.register(hva, length, clamp.mode)

    def zap(self, pages: PageSet) -> PageSet:
        """Take shared pages out of the page table, so that the next access shows; those that now are.

        What was written since is the process's own, and stays.

        :raise KernelError: the kernel refused.
        """
        if self._hand is None:
            raise ValueError(f"the overlay of {self._guest.name} is closed")
        done = PageSet(self._guest.pages)
        for claimed in self._keeper.claims(pages & self.shared()):
            try:
                runs = self._keeper.runs_of(claimed)
                # Nobody copies a page between the look and the zap: dropping a copy would lose it.
                self._keeper.protect(runs, True)
                try:
                    ours = claimed[~self._private(claimed)]
                    calls = [
                        [_SYS_MADVISE, self._hva(row, first), length * PAGE_SIZE, mmap.MADV_DONTNEED, 0, 0, 0]
                        for at, count in _rows(ours)
                        for row, first, length in self._pieces(int(ours[at]), count)
                    ]
                    refused = self._hand.batch(np.array(calls, dtype=np.int64).reshape(-1, 7))
                finally:
                    self._keeper.protect(runs, False)
            finally:
                self._keeper.give_up(claimed)
            if refused.any():
                raise KernelError(f"madvise(DONTNEED) in process {self._guest.pid}", -int(refused.min()))
            done = done | PageSet.from_numbers(self._guest.pages, ours)
        return done

    def touched(self, pages: PageSet) -> PageSet:
        """Those of the zapped ``pages`` that were read since."""
        numbers = pages.numbers()
        entries = self._entries(numbers)
        read = (entries.view(np.int64) < 0) & (entries & _FILE_ENTRY != 0)
        return PageSet.from_numbers(self._guest.pages, numbers[read])

    def remote(self, pages: PageSet) -> PageSet:
        """Those of ``pages``, which are mapped, whose memory is on another node than every vCPU runs on now.

        :raise KernelError: the process has ended.
        """
        if not numa.several_nodes():
            return PageSet(self._guest.pages)
        numbers = pages.numbers()
        readers = {numa.node_of_thread(self._guest.pid, vcpu.tid) for vcpu in self._guest.vcpus}
        found = numa.nodes_of_pages(self._guest.pid, self._addresses(numbers))
        return PageSet.from_numbers(self._guest.pages, numbers[~np.isin(found, list(readers)) & (found >= 0)])

    def _addresses(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.empty(numbers.size, dtype=np.int64)
        for region in self._guest.regions:
            here = (numbers >= region.first) & (numbers < region.first + region.pages)
            found[here] = region.hva + (numbers[here] - region.first) * PAGE_SIZE
        return found

    def statistics(self) -> OverlayStatistics:
        """A frozen snapshot."""
        return OverlayStatistics(
            len(self.shared()), len(self.copied()), self._differed, len(proc.maps(self._guest.pid)), most_mappings()
        )


_SYS_MREMAP, _MAY_MOVE, _REMAP_FIXED = 25, 1, 2
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FIXED = 0x10


def _ask(operation: str, answer: int) -> None:
    if answer < 0:
        raise KernelError(operation, -answer)


def _rows(numbers: NDArray[np.int64], alongside: NDArray[np.int64] | None = None) -> Iterator[tuple[int, int]]:
    """Group numbers that follow one another, and of which those ``alongside`` do too: index of the first, how many."""
    if not numbers.size:
        return
    breaks = np.diff(numbers) != 1
    if alongside is not None:
        breaks |= np.diff(alongside) != 1
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), numbers.size]
    for begin, end in pairwise(edges):
        yield begin, end - begin
