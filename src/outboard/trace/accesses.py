"""The access trace: which of the pages that were asked about have been touched, when, and whether by a write.

Pages are armed by zapping them (:mod:`outboard.trace.zap`) and untraced again by their first access, which is noticed
in one of two ways (:mod:`outboard.trace.watch`); :func:`open_access_trace` takes the first that the kernel offers.

===============  ==============================  =====================================================================
``page-tables``  UFFD_FEATURE_WP_ASYNC           Page tables are looked at. The guest never waits for us. Registered
                 (Linux 6.7)                     for write-protection, so that the kernel maps no neighbours of a
                                                 page that is touched, and writes are told from reads.
``messages``     UFFD_FEATURE_MINOR_SHMEM        The thread that touches an armed page sleeps until we have answered.
                 (Linux 5.13 for shmem)          The moment is exact; a page that has never been written is not seen.
===============  ==============================  =====================================================================

Memory that a pager of ours holds has its userfaultfd already. There page tables are looked at without another; a write
cannot be told from a read then, the pager answers each minor fault, and a page that it has evicted is armed as it is.

A page that could not be zapped is reported as not armed; so is, by ``page-tables``, one that was touched within the
microsecond after it was zapped. For a write the kernel first maps the page protected and then lifts that by another
fault: ``page-tables`` takes it for a read if it looks in between. A process has one trace at a time. A trace belongs to
one mapping; what other processes do to the same file is not seen.

Not used, for want of a kernel here to try them on: idle page tracking (CONFIG_IDLE_PAGE_TRACKING), DAMON over virtual
addresses (CONFIG_DAMON_VADDR), read-write protection (UFFD_FEATURE_RWP).

Source: userfaultfd(2), process_madvise(2), Documentation/admin-guide/mm/pagemap.rst and userfaultfd.rst.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError
from outboard.linux import cpuclock
from outboard.linux.pagemap import Pagemap
from outboard.linux.userfaultfd import Features, Mode, available_features
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.traps import TrapRing
from outboard.trace import watch
from outboard.trace.running import Running
from outboard.trace.zap import Moments, Places, Zap, heads, open_zap, places_of
from outboard.vmm.clamp import Clamp, registrations
from outboard.vmm.guest import Guest

_ROWS = 1024


@dataclass(frozen=True, slots=True)
class AccessTraceStatistics:
    """What a trace has done so far, in pages; ``looks`` at page tables and ``faults`` answered are counts.

    ``at_once`` were found touched when first looked at; ``dropped`` found no room and were not told of. ``state``:
    bytes held, besides one for each page of the guest.
    """

    backend: str
    zap: str
    armed: int
    accesses: int
    at_once: int
    dropped: int
    looks: int
    faults: int
    state: int


class AccessTrace(ABC):
    """A trace over a guest's memory in which nothing is armed at first.

    In memory of large pages, a page stands for all of its large page, and the first page of that is reported.

    Synchronization: one thread uses a trace; a thread of its own notices accesses meanwhile.
    """

    backend: str
    trap_s: float
    """What a trap costs the guest, in seconds, as ``bench.mrc`` measured it on two cores of a virtual machine."""
    features: Features
    mode: Mode

    def __init__(self, guest: Guest, zap: Callable[[Guest, Running], Zap] = open_zap) -> None:
        self._guest = guest
        self._running = Running(guest.pid)
        self._zap = zap(guest, self._running)
        self.ring = TrapRing(guest.pages)
        self._armed = self._accesses = 0
        self._control: NDArray[np.int64] = np.zeros(8, dtype=np.int64)
        self._fresh: NDArray[np.int64] = np.zeros((_ROWS, 3), dtype=np.int64)
        self._pagemap = Pagemap(guest.pid)
        try:
            exclude_others(guest, self._pagemap)
            self._clamp = self._hold()
        except BaseException:
            self._pagemap.close()
            raise
        self._control[watch.PROTECTED] = self._clamp is not None
        self._ask, self._reply = os.eventfd(0), os.eventfd(0)
        self._thread = threading.Thread(target=self._notice, name="access-trace", daemon=True)
        self._thread.start()

    def _hold(self) -> Clamp | None:
        """Register the memory, if that is needed."""
        return Clamp.inject(self._guest, self.features, self.mode, outlives_us=False)

    @abstractmethod
    def _notice(self) -> None:
        """The thread's work: a loop of :mod:`outboard.trace.watch`."""

    @abstractmethod
    def _arm(self, pages: NDArray[np.int64], places: Places) -> Moments:
        """Arm pages whose flags are set; since when each is armed, 0 for those that are not."""

    def _demand(self, request: int, rows: int = 0) -> None:
        """Ask the thread, and wait until it has done so."""
        self._control[watch.ASKED], self._control[watch.ROWS] = request, rows
        os.eventfd_write(self._ask, 1)
        os.eventfd_read(self._reply)

    def arm_each(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int64], Moments]:
        """Arm pages by number; those that are armed now, and since when each is.

        :param pages: ascending, without repeats.
        :raise KernelError: the kernel refused; ESRCH or ENOENT when the process has ended.
        """
        pages = heads(self._guest, pages)
        # Set before the first is zapped: from then on it can be touched.
        self.ring.traced[pages] = 1
        since = self._arm(pages, places_of(self._guest, pages))
        armed = since[:, 0] > 0
        self.ring.traced[pages[~armed]] = 0
        self._armed += int(armed.sum())
        return pages[armed], since[armed]

    def arm(self, pages: PageSet) -> PageSet:
        """Arm ``pages``: the next access to each is reported, once. Those that are armed now; errors as
        :meth:`arm_each`."""
        return PageSet.from_numbers(self._guest.pages, self.arm_each(pages.numbers())[0])

    def disarm(self, pages: PageSet) -> None:
        """Report no access to ``pages`` until they are armed again."""
        self.ring.traced[heads(self._guest, pages.numbers())] = 0

    def take(self) -> NDArray[np.void]:
        """The first accesses to armed pages noticed since the last call, as :data:`outboard.pages.traps.ACCESS`, by
        time; those pages are armed no longer.

        :raise KernelError: ESRCH: the process has ended.
        """
        failed = int(self._control[watch.FAILED])
        if failed:
            raise KernelError(f"look at the page tables of process {self._guest.pid}", failed)
        found = self.ring.take()
        self._accesses += len(found)
        return found[np.argsort(found["at"], kind="stable")]

    def collect(self) -> NDArray[np.void]:
        """As :meth:`take`, with every access that was complete before the call."""
        self._demand(watch.LOOK)
        return self.take()

    def ran(self) -> int:
        """The guest's processor time, in nanoseconds, to the tick.

        :raise KernelError: ESRCH: the process has ended.
        """
        return cpuclock.read(self._running.clock)

    def statistics(self) -> AccessTraceStatistics:
        """A frozen snapshot."""
        return AccessTraceStatistics(
            self.backend,
            self._zap.name,
            self._armed,
            self._accesses,
            int(self._control[watch.AT_ONCE]),
            self.ring.dropped,
            int(self._control[watch.LOOKS]),
            int(self._control[watch.FAULTS]),
            self.ring.records.nbytes + self._fresh.nbytes + int(self._control[watch.HEAP]),
        )

    def close(self) -> None:
        """Disarm everything and leave the guest as it was. Idempotent."""
        if self._ask < 0:
            return
        try:
            # Faults are answered until there can be no more.
            if self._clamp is not None:
                self._clamp.release()
        finally:
            self._control[watch.ASKED] = watch.STOP
            os.eventfd_write(self._ask, 1)
            self._thread.join()
            for fd in (self._ask, self._reply):
                os.close(fd)
            self._ask = self._reply = -1
            self._pagemap.close()
            self._zap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class PageTablesTrace(AccessTrace):
    """Page tables are looked at."""

    backend = "page-tables"
    trap_s = 10e-6
    features = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.WP_UNPOPULATED | Features.WP_ASYNC
    mode = Mode.WP

    def _notice(self) -> None:
        watch.look(
            self._ask,
            self._reply,
            self._pagemap.fileno(),
            self._running.clock,
            self._running.seen,
            self._control,
            self._fresh,
            self.ring.traced,
            self.ring.state,
            self.ring.records,
        )

    def _arm(self, pages: NDArray[np.int64], places: Places) -> Moments:
        since = self._zap(places, None if self._clamp is None else self._clamp.uffd)
        armed = since[:, 0] > 0
        rows = np.column_stack((pages, places.addresses, since[:, 0]))[armed]
        for first in range(0, len(rows), _ROWS):
            part = rows[first : first + _ROWS]
            self._fresh[: len(part)] = part
            self._demand(watch.WATCH, len(part))
        return since


class ManagedTrace(PageTablesTrace):
    """Page tables are looked at, in memory that a pager has registered."""

    # The pager answers a minor fault.
    trap_s = 150e-6

    def _hold(self) -> Clamp | None:
        return None


class MessagesTrace(AccessTrace):
    """Minor faults are answered."""

    backend = "messages"
    trap_s = 150e-6
    features = Features.MINOR_SHMEM | Features.MINOR_HUGETLBFS
    mode = Mode.MINOR

    def _notice(self) -> None:
        assert self._clamp is not None
        rows = [
            (region.hva, region.pages * PAGE_SIZE, region.first, region.page_size) for region in self._guest.regions
        ]
        watch.answer(
            self._ask,
            self._reply,
            self._clamp.uffd.fileno(),
            self._running.clock,
            self._running.seen,
            self._control,
            np.array(rows, dtype=np.int64),
            self.ring.traced,
            self.ring.state,
            self.ring.records,
        )

    def _arm(self, pages: NDArray[np.int64], places: Places) -> Moments:
        since = self._zap(places, None)
        # One that is mapped, but has been noted, was touched at once; one that has not, was not zapped.
        touched = (since[:, 0] == 0) & (self.ring.traced[pages] == 0)
        since[touched] = time.monotonic_ns(), self.ran()
        return since


def exclude_others(guest: Guest, pagemap: Pagemap) -> None:
    """Two traces would disarm each other's pages. The lock goes with the pagemap, however we end.

    :raise RefusedError: ``traced``.
    """
    try:
        fcntl.flock(pagemap.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RefusedError(
            "traced", f"{guest.name}: its accesses are being traced already; wait until that has ended"
        ) from None


def held_by_a_pager(guest: Guest) -> bool:
    """Where minor faults and protections are nobody's, the kernel maps a page's neighbours with it."""
    return all(
        mode & Mode.MISSING and mode & (Mode.MINOR | Mode.WP) for mode in registrations(guest.pid, guest.regions)
    )


def open_access_trace(guest: Guest) -> AccessTrace:
    """A trace over ``guest``'s memory, with the best back end that this kernel has.

    :raise RefusedError: ``access-trace``: the kernel has none; ``traced``: there is one already; ``uffd-taken``: a
        userfaultfd that is not a pager's holds the memory.
    :raise KernelError: injection or registration failed.
    """
    features = available_features()
    for kind in (PageTablesTrace, MessagesTrace):
        if features & kind.features == kind.features:
            try:
                return kind(guest)
            except RefusedError as error:
                if error.reason != "uffd-taken" or not held_by_a_pager(guest):
                    raise
                return ManagedTrace(guest)
    raise RefusedError(
        "access-trace",
        "tracing accesses needs UFFD_FEATURE_WP_ASYNC (Linux 6.7) or UFFD_FEATURE_MINOR_SHMEM (Linux 5.13), and this "
        "kernel has neither",
    )
