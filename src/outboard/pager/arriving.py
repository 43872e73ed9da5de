"""Placing pages into a guest whose memory is armed with a userfaultfd.

Before the guest runs nobody else writes its memory, so a page that arrives twice simply replaces the earlier one.
From the resume on, a page is placed by UFFDIO_COPY alone, which means "if it is absent": whatever comes second, the
answer to a fault or the bulk, gets EEXIST and is dropped, so that neither waits for the other. UFFDIO_COPY also enters
the page in the guest's page table, so what has arrived takes no fault afterwards.

Sources: userfaultfd(2), ioctl_userfaultfd(2), Linux Documentation/admin-guide/mm/userfaultfd.rst.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.pages.shared import shared_array
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest, Region

_FEATURES = Features.MISSING_SHMEM | Features.MINOR_SHMEM
_MODE = Mode.MISSING | Mode.MINOR


class ArrivingMemory:
    """The memory of one guest, absent at first.

    :param guest: attached, its vCPUs stopped; all that its memory holds is thrown away.
    :param journal: a directory of its own for a successor to find out what has arrived.
    :raise RefusedError: ``large-pages``: memory in hugetlb pages cannot be placed page by page.
    :raise KernelError: injection or registration failed.

    Synchronization: made before the engine's workers are forked; the one that serves faults and the one that places
    the bulk then share it, and the kernel decides between them. ``running`` changes once, before the guest resumes.
    """

    def __init__(self, guest: Guest, journal: Path) -> None:
        for region in guest.regions:
            if region.page_size != PAGE_SIZE:
                raise RefusedError(
                    "large-pages",
                    f"{guest.name}: its memory at {region.gpa:#x} is in pages of {region.page_size >> 20} MiB, and "
                    f'pages are placed {PAGE_SIZE} bytes at a time; start the VM with page_size = "4KiB" to migrate it',
                )
        # Thrown away only when it is ours: it may be somebody's who is not to be disturbed.
        self._hold(guest, journal, Clamp.inject(guest, _FEATURES, _MODE))
        # QEMU's own reset has written to a fresh destination; a page that is present would never fault.
        for region in guest.regions:
            guest.memory.punch(region.first, region.pages)

    def _hold(self, guest: Guest, journal: Path, clamp: Clamp) -> None:
        self.guest = guest
        self.residency = Residency(guest.pages, journal, arriving=True)
        self.waiting: NDArray[np.uint8] = shared_array(guest.pages, np.uint8)
        self._running: NDArray[np.uint8] = shared_array(1, np.uint8)
        self._clamp = clamp
        self.uffd = clamp.uffd

    @classmethod
    def take_again(cls, guest: Guest, journal: Path) -> Self:
        """Take over the memory of a guest that runs, from an engine that has died.

        :raise OutboardError: nobody holds it.
        """
        clamp = Clamp.take_again(guest, _MODE)
        if clamp is None:
            raise OutboardError(f"the memory of {guest.name} is held by nobody: what is missing there is lost")
        memory = cls.__new__(cls)
        memory._hold(guest, journal, clamp)
        memory.run()
        # What is present is the truth: the engine may have died before it noted a page that it had placed.
        memory.residency.where[guest.memory.populated().mask()] = Where.RESIDENT
        memory.wake_all()
        return memory

    @property
    def running(self) -> bool:
        """Whether the guest may be running: from then on what is present is the truth."""
        return bool(self._running[0])

    def run(self) -> None:
        """The guest is about to resume: never again replace a page that is present."""
        self._running[0] = 1

    def _pieces(self, first: int, count: int) -> Iterator[tuple[Region, int, int, int]]:
        """Split a run at region edges: (region, first page, count, HVA)."""
        for region in self.guest.regions:
            low = max(first, region.first)
            high = min(first + count, region.first + region.pages)
            if low < high:
                yield region, low, high - low, region.hva + (low - region.first) * PAGE_SIZE

    def place(self, first: int, data: memoryview, address: int) -> None:
        """Put whole pages in, from page ``first`` on.

        :param data: their content; :param address: where ``data`` lies in this process.
        :raise KernelError: the kernel refused, ESRCH when the VMM has ended.
        """
        count = len(data) // PAGE_SIZE
        where = self.residency.where
        if count == 1 and where[first] == Where.RESIDENT:
            # A page that changed after it was sent, or one that the answer to a fault has overtaken.
            if not self.running:
                self.guest.memory.write(first, data)
            return
        for _, low, pages, hva in self._pieces(first, count):
            at = (low - first) * PAGE_SIZE
            if not self.running and where[low : low + pages].any():
                self._replace(low, data[at : at + pages * PAGE_SIZE], hva, address + at)
            else:
                self._copy(hva, address + at, pages * PAGE_SIZE)
        where[first : first + count] = Where.RESIDENT

    def place_one(self, page: int, address: int) -> None:
        """Answer a fault: put one page in, if it is absent; ``address`` is where its content lies in this process."""
        for region in self.guest.regions:
            if region.first <= page < region.first + region.pages:
                self._copy(region.hva + (page - region.first) * PAGE_SIZE, address, PAGE_SIZE)
        self.residency.where[page] = Where.RESIDENT

    def _replace(self, first: int, data: memoryview, hva: int, address: int) -> None:
        for index in range(len(data) // PAGE_SIZE):
            at = index * PAGE_SIZE
            if self.residency.where[first + index] == Where.RESIDENT:
                self.guest.memory.write(first + index, data[at : at + PAGE_SIZE])
            else:
                self._copy(hva + at, address + at, PAGE_SIZE)

    def _copy(self, hva: int, address: int, length: int) -> None:
        done = 0
        while done < length:
            answer = self.uffd.copy(hva + done, address + done, length - done)
            if answer > 0:
                done += answer
            elif answer == -errno.EEXIST:
                # Present already: a fault may have found it so between our copy and its own; let it look again.
                self.uffd.wake(hva + done, PAGE_SIZE)
                done += PAGE_SIZE
            elif answer == -errno.EAGAIN:
                time.sleep(0.0001)
            else:
                raise KernelError(
                    f"UFFDIO_COPY of {length - done} bytes to {hva + done:#x} of {self.guest.name}", -answer
                )

    def place_zero(self, page: int) -> None:
        """Answer a fault on a page that reads as zeros."""
        for _, _, _, hva in self._pieces(page, 1):
            while (answer := self.uffd.zeropage(hva, PAGE_SIZE)) == -errno.EAGAIN:
                time.sleep(0.0001)
            if answer == -errno.EEXIST:
                self.uffd.wake(hva, PAGE_SIZE)
            elif answer < 0:
                raise KernelError(f"UFFDIO_ZEROPAGE at {hva:#x} of {self.guest.name}", -answer)
        self.residency.where[page] = Where.RESIDENT

    def note_zeros(self, first: int, count: int) -> None:
        """Know that pages read as zeros, without spending memory on them; who waits for one is woken to ask again."""
        where = self.residency.where[first : first + count]
        if not self.running and bool((where == Where.RESIDENT).any()):
            self.guest.memory.punch(first, count)
            where[:] = Where.ZERO
            return
        where[where != Where.RESIDENT] = Where.ZERO
        for _, _, pages, hva in self._pieces(first, count):
            self.uffd.wake(hva, pages * PAGE_SIZE)

    def note_zero_set(self, pages: PageSet) -> None:
        """Know that all absent pages of a large set read as zeros, at once; what is present stays."""
        where = self.residency.where
        where[pages.mask() & (where == Where.PEER)] = Where.ZERO
        for region in self.guest.regions:
            self.uffd.wake(region.hva, region.pages * PAGE_SIZE)

    def forget(self, pages: PageSet) -> None:
        """Make pages absent again, before the guest runs: their content has changed at the peer."""
        if self.running:
            raise ValueError(f"{self.guest.name} may be running: what is present there is the truth")
        for first, count in pages:
            self.guest.memory.punch(first, count)
            self.residency.where[first : first + count] = Where.PEER

    def map_present(self, hva: int) -> None:
        """Answer a minor fault: the page is in the file, only its mapping is missing."""
        while (answer := self.uffd.continue_(hva, PAGE_SIZE)) == -errno.EAGAIN:
            time.sleep(0.0001)
        if answer < 0:
            self.uffd.wake(hva, PAGE_SIZE)

    def page_of(self, address: int) -> int:
        """The page number of an HVA inside the guest's memory."""
        for region in self.guest.regions:
            if region.hva <= address < region.hva + region.pages * PAGE_SIZE:
                return region.first + (address - region.hva) // PAGE_SIZE
        raise ValueError(f"{address:#x} is not in the memory of {self.guest.name}")

    def wake_all(self) -> None:
        """Have everybody who waits for a page ask again: whoever was to answer is gone."""
        self.waiting[:] = 0
        for region in self.guest.regions:
            self.uffd.wake(region.hva, region.pages * PAGE_SIZE)

    def release(self) -> None:
        """Give the memory back to the VMM whole: unregister, and close the userfaultfd here and inside it. Idempotent.

        What is still absent reads as zeros from now on, so call it only when nothing is at the peer.
        """
        self._clamp.release()
