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
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, OutboardError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pager import batches, placing
from outboard.pages import PAGE_SIZE
from outboard.pages.labels import put
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Residency, Where
from outboard.pages.shared import shared_array
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest

_MODE = Mode.MISSING | Mode.MINOR


class ArrivingMemory:
    """The memory of one guest, absent at first; made by :func:`arriving_memory`.

    :param guest: attached, its vCPUs stopped; all that its memory holds is thrown away.
    :param journal: a directory of its own for a successor to find out what has arrived.
    :raise KernelError: injection or registration failed.

    Synchronization: made before the engine's workers are forked; the one that serves faults and the one that places
    the bulk then share it, and the kernel decides between them. ``running`` changes once, before the guest resumes.
    """

    unit = 1
    """Pages that the kernel enters at once."""
    features = Features.MISSING_SHMEM | Features.MINOR_SHMEM | Features.THREAD_ID

    def __init__(self, guest: Guest, journal: Path) -> None:
        # Thrown away only when it is ours: it may be somebody's who is not to be disturbed.
        self._hold(guest, journal, Clamp.inject(guest, self.features, _MODE))
        # QEMU's own reset has written to a fresh destination; a page that is present would never fault.
        for region in guest.regions:
            guest.memory.punch(region.first, region.pages)

    def _hold(self, guest: Guest, journal: Path, clamp: Clamp) -> None:
        self.guest = guest
        self.residency = Residency(guest.pages, journal, arriving=True)
        # Looked through once now, so that it need not be mapped while the guest stands still.
        self.residency.count(Where.RESIDENT)
        self.waiting: NDArray[np.uint8] = shared_array(guest.pages, np.uint8)
        self._running: NDArray[np.uint8] = shared_array(1, np.uint8)
        self._clamp = clamp
        self.uffd = clamp.uffd
        self._regions = guest.memory.table()
        self._zeros: NDArray[np.uint8] = np.zeros(self.unit * PAGE_SIZE, dtype=np.uint8)

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
        put(memory.residency.where, memory._present(), Where.RESIDENT)
        memory.wake_all()
        return memory

    def _present(self) -> PageSet:
        return self.guest.memory.populated()

    @property
    def running(self) -> bool:
        """Whether the guest may be running: from then on what is present is the truth."""
        return bool(self._running[0])

    def run(self) -> None:
        """The guest is about to resume: never again replace a page that is present."""
        self._running[0] = 1

    def place(self, runs: Runs, zero: NDArray[np.bool_], content: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Put pages in as they have come: with content, or known to be zeros, which costs no memory.

        :param runs: shape (n, 2); :param zero: one a page of theirs; :param content: of those that are not.
        :return: those of them that somebody waits for.
        :raise PeerError: such pages cannot come one by one.
        :raise KernelError: the kernel refused, ESRCH when the VMM has ended.
        """
        met: NDArray[np.int64] = np.empty(zero.size, dtype=np.int64)
        answer = placing.place(
            self.uffd.fileno(),
            self._regions,
            self.residency.where,
            self.waiting,
            self.running,
            np.ascontiguousarray(runs, dtype=np.int64),
            zero,
            content,
            met,
        )
        if answer < 0:
            raise KernelError(f"placing of {zero.size} pages in {self.guest.name}", -answer)
        return met[:answer]

    def place_one(self, page: int, address: int) -> None:
        """Answer a fault: put one page in, if it is absent; ``address`` is where its content lies in this process."""
        self._copy(page, address)

    def place_zero(self, page: int) -> None:
        """Answer a fault on a page that reads as zeros."""
        self._copy(page, self._zeros.ctypes.data)

    def _copy(self, page: int, address: int) -> None:
        size = self.unit * PAGE_SIZE
        answer = batches.copy(self.uffd.fileno(), self._hva(page), address, size, size, -1, 0)
        if answer < 0:
            raise KernelError(f"UFFDIO_COPY of page {page} of {self.guest.name}", -answer)
        self.residency.where[page : page + self.unit] = Where.RESIDENT

    def _hva(self, page: int) -> int:
        for region in self.guest.regions:
            if page < region.first + region.pages:
                return region.hva + (page - region.first) * PAGE_SIZE
        raise ValueError(f"{self.guest.name} has no page {page}")

    def note_zero_set(self, pages: PageSet) -> None:
        """Know that all absent pages of a large set read as zeros, at once; what is present stays."""
        put(self.residency.where, pages, Where.ZERO, over=Where.PEER)
        for region in self.guest.regions:
            self.uffd.wake(region.hva, region.pages * PAGE_SIZE)

    def held(self, page: int, into: memoryview) -> bool:
        """Read a page that was placed and that nobody has written since; False: it is absent, or the guest may run."""
        if self.running or self.residency.where[page] != Where.RESIDENT:
            return False
        self.guest.memory.read_into(page, into)
        return True

    def forget(self, pages: PageSet) -> None:
        """Make pages absent again, before the guest runs: their content has changed at the peer."""
        if self.running:
            raise ValueError(f"{self.guest.name} may be running: what is present there is the truth")
        for first, count in pages:
            self.guest.memory.punch(first, count)
            self.residency.where[first : first + count] = Where.PEER

    def map_present(self, page: int) -> None:
        """Answer a minor fault: the page is in the file, only its mapping is missing."""
        hva, size = self._hva(page), self.unit * PAGE_SIZE
        while (answer := self.uffd.continue_(hva, size)) == -errno.EAGAIN:
            time.sleep(0.0001)
        if answer < 0:
            self.uffd.wake(hva, size)

    def ask_again(self, page: int) -> None:
        """Have whoever waits for a page look again."""
        self.uffd.wake(self._hva(page), self.unit * PAGE_SIZE)

    def page_of(self, address: int) -> int:
        """The number of the page that an HVA inside the guest's memory is in; of a large page the first."""
        for region in self.guest.regions:
            if region.hva <= address < region.hva + region.pages * PAGE_SIZE:
                return region.first + (address - region.hva) // PAGE_SIZE // self.unit * self.unit
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
