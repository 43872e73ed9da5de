"""The devices' turn: the pages of their queues and of the requests in flight are there before the guest resumes.

A vCPU that waits for a page waits alone. QEMU's main loop, which reads the rings and copies what devices say, waits
with everything that goes through it: all devices, the monitor, and while it loads its state the whole guest.

Where a write trace is armed, these pages go ahead of the pause, and again in it if they were written. Where none is,
they go in the pause alone; should QEMU write to them after that, as it saves its devices, their digests tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from outboard.migrate import ranking
from outboard.migrate.digests import digests
from outboard.migrate.findings import Findings
from outboard.migrate.outbox import Outbox
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import QemuGuest
from outboard.vmm.virtqueues import DevicePages, find


class Devices:
    """Knows those pages of one guest.

    Synchronization: one thread, that of the guest's monitor.
    """

    def __init__(self, guest: QemuGuest, outbox: Outbox, findings: Findings) -> None:
        self._guest, self._outbox, self._findings = guest, outbox, findings
        self._told: DevicePages | None = None
        self._last = PageSet(outbox.pages)
        self._watched = PageSet(outbox.pages)
        self._digests: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)

    def ask(self) -> None:
        """Ask QEMU where the queues are."""
        found = find(self._guest.monitor)
        self._findings.queues = found.words
        self._told = DevicePages(self._guest, found)

    def due(self) -> PageSet:
        """Those that have not been sent; all of them are ranked ahead of everything else.

        :raise KernelError: the guest's memory cannot be read.
        """
        if self._told is None or not (rings := self._told.rings()):
            return PageSet(self._outbox.pages)
        in_flight = self._told.in_flight()
        if self._outbox.unit > 1:
            # A large page cannot be there in part.
            rings, in_flight = rings.widened(self._outbox.unit), in_flight.widened(self._outbox.unit)
        ranking.rank_devices(self._outbox, rings, in_flight)
        self._last = rings | in_flight
        self._findings.queue_pages = len(self._last)
        return self._last - self._outbox.already_sent()

    def watch(self, pages: PageSet) -> None:
        """Note what ``pages`` hold, which go now and which no trace watches."""
        self._watched, self._digests = pages, digests(self._guest, pages)

    def changed(self) -> PageSet:
        """Those of the watched pages that were written since."""
        if not self._watched:
            return self._watched
        numbers = self._watched.numbers()[digests(self._guest, self._watched) != self._digests]
        return PageSet.from_numbers(self._outbox.pages, numbers)

    def hit(self, pages: Iterable[int]) -> int:
        """How many of ``pages``, which devices have waited for, were to be there by then."""
        known = self._last.mask()
        return sum(1 for page in pages if 0 <= page < known.size and known[page])
