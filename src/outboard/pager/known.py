"""Pages that are here and that a disk is known to hold: should their memory fail, they can be put back from there."""

from __future__ import annotations

import mmap
import time

import numpy as np
from numpy.typing import NDArray

from outboard.errors import RefusedError
from outboard.linux import ptrace
from outboard.pager import batches
from outboard.pager.keeper import BATCH, Keeper
from outboard.pager.on_disk import OnDisk
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where

_SYS_MADVISE = 28


class Known:
    """Knows them of the guest that ``keeper`` keeps; nothing is known without ``on_disk``.

    Synchronization: the pager's thread.
    """

    def __init__(self, keeper: Keeper, on_disk: OnDisk | None) -> None:
        self._keeper, self._on_disk = keeper, on_disk
        self._room: NDArray[np.uint8] = np.empty(BATCH * PAGE_SIZE, dtype=np.uint8)

    def learn(self, pages: PageSet) -> int:
        """Find those of ``pages`` that are resident on the guest's disks, and know them until they are written to.

        The first write to such a page takes a fault. What is known can be replaced when its memory fails.

        :return: how many are known now.
        :raise KernelError: the kernel refused.
        """
        if self._on_disk is None:
            return 0
        for numbers in self._keeper.claims(pages & self._keeper.residency.pages_at(Where.RESIDENT)):
            runs = self._keeper.runs_of(numbers)
            content = self._room[: numbers.size * PAGE_SIZE]
            try:
                self._keeper.protect(runs, True)
                self._keeper.read(runs, content)
                found, blocks = self._on_disk.look_up(numbers, content, zero_pages(content))
                self._keeper.residency.locator[numbers[found]] = blocks
                self._on_disk.known[numbers] = found
                others = self._keeper.runs_of(numbers[~found])
                self._keeper.protect(others, False)
            finally:
                self._keeper.give_up(numbers)
        return int(np.count_nonzero(self._on_disk.known))

    def replace(self, page: int) -> None:
        """Put a page whose memory has failed back, as a disk holds it; the guest runs meanwhile.

        :raise RefusedError: ``not-on-disk``: no disk is known to hold what the page held last; it is as it was.
        :raise DamagedPageError: the disk holds it no longer.
        :raise KernelError: the kernel refused.
        """
        guest = self._keeper.guest
        if not 0 <= page < guest.pages:
            raise RefusedError("no-such-page", f"{guest.name} has pages 0 to {guest.pages - 1}, not {page}")
        number = np.array([page], dtype=np.int64)
        wanted = PageSet.from_numbers(guest.pages, number)
        while not any(True for _ in self._keeper.claims(wanted)):
            time.sleep(0.0001)
        runs = self._keeper.runs_of(number)
        try:
            here = self._keeper.residency.where[page] == Where.RESIDENT
            if self._on_disk is None or not self._on_disk.known[page] or not here:
                raise RefusedError(
                    "not-on-disk",
                    f"page {page} of {guest.name} is not known to lie on any of its disks as it was last: it was "
                    "written since, or no disk ever held it; what it held is lost",
                )
            content = self._room[:PAGE_SIZE]
            digest = self._on_disk.digests[number]
            self._on_disk.store.fetch(self._keeper.residency.locator[number], digest, content)
            self._keeper.punch(runs)
            # A mark of the failure in the page table outlives the page.
            self._unmap(page)
            self._keeper.place(runs, content, over=True)
            self._on_disk.known[page] = 0
        finally:
            self._keeper.give_up(number)

    def _unmap(self, page: int) -> None:
        row = self._keeper.regions[batches.row_of(self._keeper.regions, page)]
        address = int(row[2] + (page - row[0]) * PAGE_SIZE)
        with ptrace.Stopped(self._keeper.guest.pid, self._keeper.guest.emulator_thread()) as target:
            target.syscall("madvise(DONTNEED)", _SYS_MADVISE, address, PAGE_SIZE, mmap.MADV_DONTNEED)
