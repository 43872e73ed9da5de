"""The pager: moves pages of a running guest between its memory and stores, and serves the faults on those away.

Eviction, in batches: claim the pages, write-protect them, read them through the guest's file, put them into the store,
note that in the residency, punch them, give the claims up and wake whoever came meanwhile. A page of zeros goes
nowhere: that it is one is all there is to keep. Fetching is the reverse, ahead of a fault; whichever of the two comes
first has the page. Why nothing is lost on the way, not even by dying, is told in :mod:`outboard.pages.residency`.

Sources: userfaultfd(2), ioctl_userfaultfd(2), fallocate(2).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, RefusedError
from outboard.linux.hand import await_none
from outboard.linux.userfaultfd import Features, Mode
from outboard.pager import batches
from outboard.pager.faults import FaultServer, FaultStatistics
from outboard.pager.overlay import Overlay, overlaid
from outboard.pager.serving import Table
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.pageset import PageSet, Runs, chop
from outboard.pages.residency import STORED, Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest

_FEATURES = (
    Features.MISSING_SHMEM
    | Features.MINOR_SHMEM
    | Features.PAGEFAULT_FLAG_WP
    | Features.WP_HUGETLBFS_SHMEM
    | Features.EVENT_FORK
    | Features.EVENT_REMAP
    | Features.EVENT_UNMAP
)
_MODE = Mode.MISSING | Mode.MINOR | Mode.WP
_BATCH = 256
"""Pages: a megabyte in transit, and nobody waits longer for a page than such a batch takes."""


@dataclass(frozen=True, slots=True)
class PagerStatistics:
    """Pages by where they are now; pages evicted (``zeros`` of them all zeros) and fetched ahead of a fault so far.

    ``shared`` pages are mapped from a sharing pool, written since or not.
    """

    pages: int
    resident: int
    zero: int
    pool: int
    file: int
    shared: int
    evicted: int
    zeros: int
    fetched: int
    faults: FaultStatistics


class Pager:
    """Manages the pages of ``guest``.

    :param residency: where they are; of an engine that has died, where it left them.
    :param stores: where pages may go: ``Where.POOL``, ``Where.FILE``, or both.
    :param clamp: the hold on a guest whose VMM has handed it over; the pager's own when not given.
    :raise RefusedError: ``large-pages``; ``anonymous-memory``; ``no-write-protection``; ``uffd-taken``.
    :raise KernelError: the kernel refused.

    Faults are served from the start to :meth:`close` or :meth:`release`.

    Synchronization: one thread; faults are served by another, which this class starts.
    """

    def __init__(
        self, guest: Guest, residency: Residency, stores: Mapping[Where, FileStore], clamp: Clamp | None = None
    ) -> None:
        if clamp is not None and not clamp.mode & Mode.WP:
            raise RefusedError(
                "no-write-protection",
                f"{guest.name}: its VMM registered its memory without write-protection, and what is written to a page "
                "while it is evicted would be lost; have it hand over with mode MISSING|WP",
            )
        for region in guest.regions:
            if not region.has_file:
                raise RefusedError(
                    "anonymous-memory",
                    f"{guest.name}: its memory at {region.gpa:#x} has no file, and cannot be given up from outside",
                )
            if region.page_size != PAGE_SIZE:
                raise RefusedError(
                    "large-pages",
                    f"{guest.name}: its memory at {region.gpa:#x} is in pages of {region.page_size >> 20} MiB, and "
                    f'pages are evicted {PAGE_SIZE} bytes at a time; start the VM with page_size = "4KiB" to manage it',
                )
        self.guest = guest
        self.residency = residency
        self._stores = stores
        self._regions = guest.memory.table()
        self._claimed: NDArray[np.uint8] = np.zeros(guest.pages, dtype=np.uint8)
        self._staging: NDArray[np.uint8] = np.empty(_BATCH * PAGE_SIZE, dtype=np.uint8)
        self._evicted = self._zeros = self._fetched = 0
        self._clamp = clamp or Clamp.take_again(guest, _MODE) or Clamp.inject(guest, _FEATURES, _MODE)
        self.overlay: Overlay | None = None
        self._faults = FaultServer(self._table(), self._clamp.uffd.fileno())
        try:
            self._recover()
        except BaseException:
            # Nothing is away if nobody had the guest before us; else it is left to whoever comes next.
            self._faults.close()
            if any(self.residency.count(where) for where in (*STORED, Where.SHARED)):
                self._clamp.close()
            else:
                self._clamp.release()
            raise
        self._faults.start()

    def _table(self) -> Table:
        files: NDArray[np.int32] = np.full(max(Where) + 1, -1, dtype=np.int32)
        taken, digests = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint64)
        arrays = dict.fromkeys(STORED, (taken, digests))
        for where, store in self._stores.items():
            files[where] = store.fileno()
            arrays[where] = store.taken, digests if store.digests is None else store.digests
        return Table(
            self._regions,
            self.residency.where,
            self.residency.locator,
            self._claimed,
            files,
            *arrays[Where.POOL],
            *arrays[Where.FILE],
        )

    def _recover(self) -> None:
        """Make the journal agree with the file, lift every protection, and have everybody ask again."""
        where = self.residency.where
        whole = self._split(np.array([[0, self.guest.pages]], dtype=np.int64))
        self._ask("UFFDIO_WRITEPROTECT", batches.protect(self._clamp.uffd.fileno(), self._regions, whole, 0))
        # Another engine's hand may be at work yet, and wait for its events to be read; whoever faults is woken later.
        await_none(self.guest.pid, self._clamp.uffd.read)
        self.follow_mappings()
        away = (where > Where.ZERO) & (where != Where.SHARED)
        if away.any():
            where[away & self.guest.memory.populated().mask()] = Where.RESIDENT
        for kind, store in self._stores.items():
            store.retain(self.residency.locator[where == kind])
        self._ask("UFFDIO_WAKE", batches.wake(self._clamp.uffd.fileno(), self._regions, whole))

    def follow_mappings(self) -> None:
        """Make the journal and the guest's file agree with what is mapped, where the journal says shared."""
        shared = self.residency.where == Where.SHARED
        if shared.any():
            mapped = overlaid(self.guest).mask()
            self.residency.where[shared & ~mapped] = Where.RESIDENT
            self.punch(self.runs_of(np.flatnonzero(shared & mapped)))

    def share_from(self, pool: int) -> Overlay:
        """Have an overlay that shares pages from ``pool``, a descriptor; the one there is already.

        :raise RefusedError, KernelError: as :class:`~outboard.pager.overlay.Overlay`.
        """
        if self.overlay is None:
            self.overlay = Overlay(self, pool)
        return self.overlay

    def stop_sharing(self) -> None:
        """Un-share everything, and take what sharing needs out of the process. Idempotent.

        :raise RefusedError: ``shared``: there are shared pages, and nobody has said from which pool.
        """
        if self.overlay is not None:
            while self.residency.count(Where.SHARED):
                self.overlay.unshare(PageSet.full(self.guest.pages))
            self.overlay.close()
            self.overlay = None
        elif self.residency.count(Where.SHARED):
            raise RefusedError("shared", f"{self.guest.name}: it has shared pages, whose pool is not open")

    @property
    def clamp(self) -> Clamp:
        """The hold on the guest's memory."""
        return self._clamp

    @property
    def regions(self) -> NDArray[np.int64]:
        """As :meth:`~outboard.vmm.guest.GuestMemory.table`; rows follow mremap(2)."""
        return self._regions

    @property
    def spaces(self) -> int:
        """Address spaces that map the guest's memory, as far as faults tell: its own, and of children it forked."""
        return self._faults.spaces

    def _ask(self, operation: str, answer: int) -> None:
        if answer < 0:
            raise KernelError(f"{operation} on the memory of {self.guest.name}", -answer)

    def _everywhere(self, operation: str, runs: Runs, protected: int | None = None) -> None:
        """Protect, unprotect (0) or wake (None) in the guest's address space and those of its children."""
        for uffd in self._faults.uffds[: self._faults.spaces].tolist():
            if protected is None:
                answer = batches.wake(uffd, self._regions, runs)
            else:
                answer = batches.protect(uffd, self._regions, runs, protected)
            if answer == -errno.ESRCH and uffd != self._clamp.uffd.fileno():
                # A child that has ended.
                continue
            self._ask(operation, answer)

    def _split(self, runs: Runs) -> Runs:
        """Cut runs at the edges of regions."""
        pieces = []
        for first, count in self._regions[:, :2].tolist():
            low = np.maximum(runs[:, 0], first)
            high = np.minimum(runs[:, 0] + runs[:, 1], first + count)
            inside = low < high
            pieces.append(np.column_stack((low[inside], high[inside] - low[inside])))
        return np.ascontiguousarray(np.concatenate(pieces))

    def claims(self, pages: PageSet, most: int = _BATCH) -> Iterator[NDArray[np.int64]]:
        """Claim ``pages``, ``most`` at a time; those that somebody else is busy with are passed over."""
        numbers = pages.numbers()
        for at in range(0, numbers.size, most):
            batch = numbers[at : at + most]
            ours = np.empty(batch.size, dtype=np.bool_)
            if batches.claim(self._claimed, batch, ours):
                yield np.ascontiguousarray(batch[ours])

    def give_up(self, claimed: NDArray[np.int64]) -> None:
        """Give claims up, and wake whoever waits for those pages."""
        runs = self.runs_of(claimed)
        batches.release(self._claimed, claimed)
        self._everywhere("UFFDIO_WAKE", runs)

    def protect(self, runs: Runs, protected: bool) -> None:
        """Write-protect runs, or lift that and wake who waits to write."""
        self._everywhere("UFFDIO_WRITEPROTECT", runs, int(protected))

    def punch(self, runs: Runs) -> None:
        """Free the memory of runs in the guest's file."""
        self._ask("fallocate(PUNCH_HOLE)", batches.punch(self._regions, runs))

    def runs_of(self, numbers: NDArray[np.int64]) -> Runs:
        """Runs of page numbers, none across an edge of regions."""
        return self._split(PageSet.from_numbers(self.guest.pages, numbers).runs())

    def evict(self, pages: PageSet, to: Where) -> int:
        """Move those of ``pages`` that are resident into a store, while the guest runs; how many went.

        A page that is being fetched this very moment stays.

        :param to: ``Where.POOL`` or ``Where.FILE``.
        :raise StoreFullError: there is no room; what has not gone is where it was.
        :raise KernelError: the kernel refused; a page is where it was or where it was going, never neither.
        """
        store = self._stores[to]
        went = 0
        for claimed in self.claims(pages & self.residency.pages_at(Where.RESIDENT)):
            try:
                self._put_away(claimed, to, store)
                went += claimed.size
                self._evicted += claimed.size
            finally:
                self.give_up(claimed)
        return went

    def _put_away(self, numbers: NDArray[np.int64], to: Where, store: FileStore) -> None:
        runs = self.runs_of(numbers)
        content = self._staging[: numbers.size * PAGE_SIZE]
        try:
            self._everywhere("UFFDIO_WRITEPROTECT", runs, 1)
            self._ask("pread", batches.read(self._regions, runs, content))
            zero = zero_pages(content)
            kept = content.reshape(-1, PAGE_SIZE)[~zero].reshape(-1) if zero.any() else content
            locators = store.put(kept)
        except BaseException:
            self._everywhere("UFFDIO_WRITEPROTECT", runs, 0)
            raise
        self.residency.went(numbers[~zero], to, locators)
        self.residency.where[numbers[zero]] = Where.ZERO
        self._zeros += int(np.count_nonzero(zero))
        self.punch(runs)

    def fetch(self, pages: PageSet) -> int:
        """Bring those of ``pages`` that are in stores back, ahead of a fault; how many came.

        :raise DamagedPageError: one or more are not what was put away; all others have come.
        :raise KernelError: the kernel refused.
        """
        came = 0
        damage: DamagedPageError | None = None
        for where, store in self._stores.items():
            for claimed in self.claims(pages & self.residency.pages_at(where)):
                # A fault may have brought some between the look and the claim.
                numbers = np.ascontiguousarray(claimed[self.residency.where[claimed] == where])
                try:
                    self._bring_back(numbers, store)
                    came += numbers.size
                except DamagedPageError as error:
                    damage = error
                    came += self._bring_what_is_whole(numbers, store)
                finally:
                    self.give_up(claimed)
        self._fetched += came
        if damage is not None:
            raise damage
        return came

    def _bring_back(self, numbers: NDArray[np.int64], store: FileStore) -> None:
        content = self._staging[: numbers.size * PAGE_SIZE]
        locators = self.residency.locator[numbers]
        store.fetch(locators, content)
        runs = self.runs_of(numbers)
        self._ask("UFFDIO_COPY", batches.place(self._clamp.uffd.fileno(), self._regions, runs, content))
        self.residency.returned(numbers)
        store.drop(locators)

    def _bring_what_is_whole(self, numbers: NDArray[np.int64], store: FileStore) -> int:
        came = 0
        for page in np.split(numbers, numbers.size):
            with contextlib.suppress(DamagedPageError):
                self._bring_back(page, store)
                came += 1
        return came

    def populate(self, pages: PageSet) -> None:
        """Bring ``pages`` back and enter them in the guest's page table: none that holds anything takes a fault.

        Where minor faults are not told of (a VMM that handed over without them) the kernel maps what is present itself.
        """
        self.fetch(pages)
        if not self._clamp.mode & Mode.MINOR:
            return
        runs = self._split(chop(pages.runs(), 1 << 15))
        self._ask("UFFDIO_CONTINUE", batches.map_present(self._clamp.uffd.fileno(), self._regions, runs))

    def release(self) -> None:
        """Make everything resident and let the guest go: its memory is its own again. Idempotent.

        :raise DamagedPageError, KernelError: as :meth:`fetch`; the guest is still managed then.
        """
        self.stop_sharing()
        while any(self.residency.count(where) for where in self._stores):
            self.fetch(PageSet.full(self.guest.pages))
        self._faults.close()
        self._clamp.release()

    def close(self) -> None:
        """Let go of the guest and leave its pages where they are: who touches an absent one waits for a successor."""
        if self.overlay is not None:
            # Its faults are served while it ends what it does.
            self.overlay.close()
            self.overlay = None
        self._faults.close()
        self._clamp.close()

    @property
    def failure(self) -> Exception | None:
        """What the serving of faults met with: a damaged page, or its end."""
        return self._faults.failure

    def statistics(self) -> PagerStatistics:
        """A frozen snapshot."""
        counts = np.bincount(self.residency.where, minlength=max(Where) + 1).tolist()
        return PagerStatistics(
            pages=self.guest.pages,
            resident=counts[Where.RESIDENT],
            zero=counts[Where.ZERO],
            pool=counts[Where.POOL],
            file=counts[Where.FILE],
            shared=counts[Where.SHARED],
            evicted=self._evicted,
            zeros=self._zeros,
            fetched=self._fetched,
            faults=self._faults.statistics(),
        )
