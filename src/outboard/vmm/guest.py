"""A guest: its memory as QEMU laid it out, its vCPUs, and a way to read pages without mapping them.

Pages are numbered densely over the regions in guest-physical order, in units of 4 KiB; the hole below 4 GiB takes no
numbers. Both ends of a migration number the same pages, while addresses and files differ.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux import fallocate, proc
from outboard.linux.pagemap import Pagemap
from outboard.linux.proc import Mapping
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.monitor import Monitor

_HAS_CONTENT = np.uint64(0b11 << 62)
"""Bits of a pagemap entry: in memory, or swapped out."""
_ENTRIES = 1 << 18
"""Entries of a pagemap to read at once: 2 MiB of them, for 1 GiB of pages."""


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of memory that is contiguous for the guest, in QEMU's address space and in its file.

    ``first``, ``pages`` in pages; ``gpa``, ``hva``, ``offset`` (in the file), ``page_size`` in bytes. ``mapping`` is
    the kernel's name for the file: the mapping of QEMU's that holds it.
    """

    first: int
    pages: int
    gpa: int
    hva: int
    offset: int
    page_size: int
    memdev: str
    mapping: Mapping

    @property
    def has_file(self) -> bool:
        """Whether what the guest writes there is in the file, and not in pages of the process's own."""
        return self.mapping.shared and self.mapping.inode != 0


@dataclass(frozen=True, slots=True)
class VCpu:
    """A virtual processor and the thread that runs it."""

    index: int
    tid: int


class GuestMemory:
    """The content of a guest's pages, through its files.

    No page is ever mapped here: a mapping would allocate what is absent, and keep the kernel from zapping what is not.

    Synchronization: reads and writes at a position (pread, pwrite): any thread, any forked process.
    """

    _what = "the guest's file"

    def __init__(self, pid: int, regions: tuple[Region, ...]) -> None:
        self._regions = regions
        self._starts = [region.offset for region in regions]
        self._fds: list[int] = []
        # hugetlbfs takes no write(2).
        self._process = -1
        files: dict[tuple[int, int], int] = {}
        try:
            for region in regions:
                key = (region.mapping.start, region.mapping.end)
                if key not in files:
                    files[key] = proc.open_mapping(pid, region.mapping)
                self._fds.append(files[key])
            if any(region.page_size > PAGE_SIZE for region in regions):
                self._process = _open_memory(pid)
        except KernelError:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        for fd in {*self._fds, self._process} - {-1}:
            os.close(fd)
        self._fds, self._process = [], -1

    def files(self) -> Iterator[tuple[Region, int]]:
        """Each region with the descriptor that it is read by, which stays this object's."""
        return zip(self._regions, self._fds, strict=True)

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Split a run at region edges: descriptor, byte offset in it, first page, pages."""
        last = self._regions[-1]
        if first < 0 or first + count > last.first + last.pages:
            raise ValueError(f"pages {first} to {first + count} are not all the guest's")
        for region, start, fd in zip(self._regions, self._starts, self._fds, strict=True):
            low = max(first, region.first)
            high = min(first + count, region.first + region.pages)
            if low < high:
                yield fd, start + (low - region.first) * PAGE_SIZE, low, high - low

    def read_into(self, first: int, buffer: memoryview) -> None:
        """Read whole pages from page ``first`` on; absent ones read as zeros.

        :raise KernelError: the read failed, or came short. :raise ValueError: there are no such pages.
        """
        for fd, offset, low, pages in self._pieces(first, len(buffer) // PAGE_SIZE):
            at = (low - first) * PAGE_SIZE
            part = buffer[at : at + pages * PAGE_SIZE]
            self._whole(os.preadv, fd, part, offset, f"read of {pages} pages from page {low} of {self._what}")

    def write(self, first: int, data: memoryview) -> None:
        """Write whole pages from page ``first`` on; in hugetlbfs only those that the process has mapped.

        :raise KernelError: the write failed, or came short. :raise ValueError: there are no such pages.
        """
        for fd, offset, low, pages in self._pieces(first, len(data) // PAGE_SIZE):
            if self._process >= 0:
                region = next(one for one in self._regions if low < one.first + one.pages)
                fd, offset = self._process, region.hva + (low - region.first) * PAGE_SIZE
            at = (low - first) * PAGE_SIZE
            part = data[at : at + pages * PAGE_SIZE]
            self._whole(os.pwritev, fd, part, offset, f"write of {pages} pages at page {low} of {self._what}")

    @staticmethod
    def _whole(
        call: Callable[[int, list[memoryview], int], int], fd: int, part: memoryview, offset: int, operation: str
    ) -> None:
        try:
            done = call(fd, [part], offset)
        except OSError as error:
            raise KernelError(operation, error.errno or errno.EIO) from error
        if done != len(part):
            raise KernelError(f"{operation} came short: {done} of {len(part)} bytes", errno.EIO)

    def punch(self, first: int, count: int) -> None:
        """Free the memory behind a run; it reads as zeros and is unmapped from QEMU.

        :raise KernelError: the file cannot have holes. :raise ValueError: there are no such pages.
        """
        for fd, offset, _, pages in self._pieces(first, count):
            fallocate.punch(fd, offset, pages * PAGE_SIZE)

    def allocate(self, first: int, count: int) -> None:
        """Give memory to those of a run that have none; what they hold stays as it is.

        :raise KernelError: there is none. :raise ValueError: there are no such pages.
        """
        for fd, offset, _, pages in self._pieces(first, count):
            fallocate.allocate(fd, offset, pages * PAGE_SIZE)

    def table(self) -> NDArray[np.int64]:
        """For compiled loops, a row for each region: first page, pages, HVA, offset in its file, our descriptor."""
        return np.array(
            [
                (region.first, region.pages, region.hva, region.offset, fd)
                for region, fd in zip(self._regions, self._fds, strict=True)
            ],
            dtype=np.int64,
        )

    def populated(self, among: PageSet | None = None) -> PageSet:
        """The pages that have memory; all others have never been written and read as zeros. Source: lseek(2).

        :param among: look only at these; many runs cost more than few.
        """
        last = self._regions[-1]
        pages = last.first + last.pages
        found: list[tuple[int, int]] = []
        for first, count in [[0, pages]] if among is None else among:
            for region, fd in zip(self._regions, self._fds, strict=True):
                low, high = max(first, region.first), min(first + count, region.first + region.pages)
                if low < high:
                    base = region.offset // PAGE_SIZE - region.first
                    found += ((data - base, size) for data, size in _data(fd, low + base, high + base))
        return PageSet.from_runs(pages, np.array(found, dtype=np.int64).reshape(-1, 2))


def _data(fd: int, page: int, end: int) -> Iterator[tuple[int, int]]:
    """The runs of pages ``[page, end)`` of a file that are no holes."""
    while page < end:
        try:
            data = os.lseek(fd, page * PAGE_SIZE, os.SEEK_DATA)
        except OSError:
            # ENXIO: nothing but a hole up to the end of the file.
            return
        first, page = data // PAGE_SIZE, -(-os.lseek(fd, data, os.SEEK_HOLE) // PAGE_SIZE)
        if first < end:
            yield first, min(page, end) - first


def _open_memory(pid: int) -> int:
    path = f"/proc/{pid}/mem"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open of {path}", error.errno or errno.EIO) from error


class AnonymousMemory(GuestMemory):
    """The content of pages that no file holds, through /proc/PID/mem.

    What the process itself has never touched is not touched here either: the kernel's page tables (/proc/PID/pagemap)
    are asked first, and what they lack reads as zeros. While the memory is registered for missing pages, an absent one
    cannot be written this way (EIO): UFFDIO_COPY places it.

    Synchronization: as GuestMemory.
    """

    _what = "the process's memory"

    def __init__(self, pid: int, regions: tuple[Region, ...]) -> None:
        self._regions = regions
        self._starts = [region.hva for region in regions]
        self._pagemap = Pagemap(pid)
        self._process = -1
        try:
            self._fds = [_open_memory(pid)] * len(regions)
        except KernelError:
            self._pagemap.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._pagemap.close()
        super().close()

    def _present(self, hva: int, pages: int) -> NDArray[np.bool_]:
        entries = self._pagemap.entries(hva, pages)
        found: NDArray[np.bool_] = (entries & _HAS_CONTENT) != 0
        return found

    def read_into(self, first: int, buffer: memoryview) -> None:
        """Read whole pages from page ``first`` on; absent ones read as zeros.

        :raise KernelError: the read failed, or the process has ended. :raise ValueError: there are no such pages.
        """
        for fd, hva, low, pages in self._pieces(first, len(buffer) // PAGE_SIZE):
            present = self._present(hva, pages)
            edges = [0, *(np.flatnonzero(np.diff(present)) + 1).tolist(), pages]
            for begin, end in pairwise(edges):
                at = (low - first + begin) * PAGE_SIZE
                part = buffer[at : at + (end - begin) * PAGE_SIZE]
                if present[begin]:
                    what = f"read of {end - begin} pages from page {low + begin} of {self._what}"
                    self._whole(os.preadv, fd, part, hva + begin * PAGE_SIZE, what)
                else:
                    part[:] = bytes(len(part))

    def punch(self, first: int, count: int) -> None:
        """Not possible from outside.

        :raise RefusedError: ``anonymous-memory``. :raise ValueError: there are no such pages.
        """
        for _ in self._pieces(first, count):
            raise RefusedError(
                "anonymous-memory",
                f"{count} pages from page {first} on cannot be freed: anonymous memory has no file to punch a hole in; "
                "only its process can give it back (madvise MADV_DONTNEED, as a balloon does)",
            )

    def populated(self, among: PageSet | None = None) -> PageSet:
        """The pages that have memory, or are swapped out; all others read as zeros. Source: pagemap.rst."""
        last = self._regions[-1]
        mask: NDArray[np.bool_] = np.zeros(last.first + last.pages, dtype=np.bool_)
        for _, hva, low, pages in self._pieces(0, mask.size):
            for begin in range(0, pages, _ENTRIES):
                count = min(_ENTRIES, pages - begin)
                mask[low + begin : low + begin + count] = self._present(hva + begin * PAGE_SIZE, count)
        found = PageSet.from_mask(mask)
        return found if among is None else found & among


class Guest:
    """An attached VM, or any process whose memory is managed like one: its memory, and who runs in it.

    Nothing of the process changes by attaching to it, nor by closing.

    Synchronization: ``memory`` and what is frozen may be used by any thread and by forked workers.
    """

    def __init__(self, name: str, pid: int, regions: tuple[Region, ...], vcpus: tuple[VCpu, ...] = ()) -> None:
        self.name = name
        self.pid = pid
        self.regions = regions
        self.vcpus = vcpus
        self.pages = regions[-1].first + regions[-1].pages
        # One region without a file is enough: /proc/PID/mem reads the others too.
        kind = GuestMemory if all(region.has_file for region in regions) else AnonymousMemory
        self.memory = kind(pid, regions)

    def grown(self, more: Iterable[Region]) -> Guest:
        """The same guest with more memory, as an object of its own; this one stays as it is.

        :param more: its pages numbered after those present, whatever its address.
        :raise KernelError: the process has ended.
        """
        return Guest(self.name, self.pid, (*self.regions, *more), self.vcpus)

    def close(self) -> None:
        """Let go. Idempotent."""
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def pages_of_pfns(self, pfns: NDArray[np.integer]) -> NDArray[np.int64]:
        """The page number of each guest page frame number; -1 where QEMU has no memory."""
        found: NDArray[np.int64] = np.full(pfns.shape, -1, dtype=np.int64)
        signed = pfns.astype(np.int64)
        for region in self.regions:
            inside = signed - region.gpa // PAGE_SIZE
            here = (inside >= 0) & (inside < region.pages)
            found[here] = inside[here] + region.first
        return found

    def emulator_thread(self) -> int:
        """A thread that runs no vCPU, to stop for an instant: QEMU's main loop.

        :raise OutboardError: every thread is a vCPU's, which no QEMU is.
        """
        busy = {vcpu.tid for vcpu in self.vcpus}
        if self.pid not in busy:
            return self.pid
        for thread in proc.threads(self.pid):
            if thread.tid not in busy:
                return thread.tid
        raise OutboardError(f"{self.name}: process {self.pid} has no thread but its vCPUs'")


class QemuGuest(Guest):
    """A VM under QEMU, made by :func:`outboard.vmm.attach.attach`: also its monitor, and where its guest agent listens.

    Synchronization: one thread uses the monitor.
    """

    def __init__(
        self,
        name: str,
        pid: int,
        regions: tuple[Region, ...],
        vcpus: tuple[VCpu, ...],
        monitor: Monitor,
        agent_path: Path | None,
    ) -> None:
        super().__init__(name, pid, regions, vcpus)
        self.monitor = monitor
        self.agent_path = agent_path

    def close(self) -> None:
        """Let go. Idempotent."""
        self.monitor.close()
        super().close()
