"""The pager: moves pages of a running guest between its memory and stores, and serves the faults on those away.

Eviction, in batches: claim the pages, write-protect them, read them through the guest's file, put them into the store,
note that in the residency, punch them, give the claims up and wake whoever came meanwhile. A page of zeros goes
nowhere: that it is one is all there is to keep; nor does a page that a disk of the guest's holds. Fetching is the
reverse, ahead of a fault; whichever of the two comes first has the page. Why nothing is lost on the way, not even by
dying, is told in :mod:`outboard.pages.residency`.

Sources: userfaultfd(2), ioctl_userfaultfd(2), fallocate(2).
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, RefusedError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pager import batches, saving
from outboard.pager.capture import RING, Capture
from outboard.pager.evicting import Eviction
from outboard.pager.faults import FaultServer, FaultStatistics
from outboard.pager.keeper import BATCH
from outboard.pager.mappings import overlaid
from outboard.pager.on_disk import OnDisk
from outboard.pager.overlay import Overlay
from outboard.pager.recovery import recover
from outboard.pager.saving import Saving
from outboard.pager.table import LENDER, Table
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs, chop
from outboard.pages.residency import STORED, Residency, Where
from outboard.pages.shared import shared_array
from outboard.stores import snapshot
from outboard.stores.file import FileStore
from outboard.stores.snapshot import SnapshotStore
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
    disk: int
    snapshot: int
    shared: int
    evicted: int
    zeros: int
    fetched: int
    faults: FaultStatistics


class Pager:
    """Manages the pages of ``guest``.

    :param residency: where they are; of an engine that has died, where it left them.
    :param stores: where pages may go, ``Where.POOL``, ``Where.FILE``, or both, or come from, ``Where.SNAPSHOT``.
    :param clamp: the hold on a guest whose VMM has handed it over; the pager's own when not given.
    :param on_disk: what the guest's disks hold.
    :raise RefusedError: ``large-pages``; ``anonymous-memory``; ``no-write-protection``; ``uffd-taken``.
    :raise KernelError: the kernel refused.

    Faults are served from the start to :meth:`close` or :meth:`release`.

    Synchronization: one thread; faults are served by another, which this class starts.
    """

    def __init__(
        self,
        guest: Guest,
        residency: Residency,
        stores: Mapping[Where, FileStore | SnapshotStore],
        clamp: Clamp | None = None,
        on_disk: OnDisk | None = None,
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
        self._on_disk = on_disk
        self._regions = guest.memory.table()
        self._claimed: NDArray[np.uint8] = np.zeros(guest.pages, dtype=np.uint8)
        # On whole pages, as files that go past the page cache ask.
        self._staging: NDArray[np.uint8] = shared_array(BATCH * PAGE_SIZE, np.uint8)
        self._eviction = Eviction(self, on_disk)
        self._fetched = 0
        self._clamp = clamp or Clamp.take_again(guest, _MODE) or Clamp.inject(guest, _FEATURES, _MODE)
        self._rows = self._snapshot_rows()
        self.overlay: Overlay | None = None
        self._faults = FaultServer(self._table(saving.nothing()), self._clamp.uffd.fileno())
        try:
            recover(self, self._stores)
        except BaseException:
            # Nothing is away if nobody had the guest before us; else it is left to whoever comes next.
            self._faults.close()
            if any(self.residency.count(where) for where in (*STORED, Where.SHARED)):
                self._clamp.close()
            else:
                self._clamp.release()
            raise
        self._faults.start()

    def _snapshot_rows(self) -> tuple[snapshot.Rows, snapshot.Desk]:
        store = self._stores.get(Where.SNAPSHOT)
        return (store.rows, store.desk()) if isinstance(store, SnapshotStore) else snapshot.no_rows()

    def _table(self, image: Saving) -> Table:
        files: NDArray[np.int32] = np.full(max(Where) + 2, -1, dtype=np.int32)
        lent = np.empty(0, dtype=np.int64)
        taken, digests = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint64)
        arrays = dict.fromkeys(STORED, (taken, digests))
        for where, store in self._stores.items():
            if not isinstance(store, FileStore):
                continue
            files[where] = store.fileno()
            if store.lent.size:
                files[LENDER], lent = store.lender(), store.lent
            arrays[where] = store.taken, digests if store.digests is None else store.digests
        return Table(
            self._regions,
            self.residency.where,
            self.residency.locator,
            self._claimed,
            files,
            *arrays[Where.POOL],
            *arrays[Where.FILE],
            lent,
            np.empty(0, dtype=np.int32) if self._on_disk is None else self._on_disk.store.files,
            digests if self._on_disk is None else self._on_disk.digests,
            taken if self._on_disk is None else self._on_disk.known,
            *self._rows,
            image,
        )

    def whole(self) -> Runs:
        """All of the guest's memory."""
        return self._split(np.array([[0, self.guest.pages]], dtype=np.int64))

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
        if len(self._regions) == 1:
            return np.ascontiguousarray(runs)
        pieces = []
        for first, count in self._regions[:, :2].tolist():
            low = np.maximum(runs[:, 0], first)
            high = np.minimum(runs[:, 0] + runs[:, 1], first + count)
            inside = low < high
            pieces.append(np.column_stack((low[inside], high[inside] - low[inside])))
        return np.ascontiguousarray(np.concatenate(pieces))

    def claims(self, pages: PageSet, most: int = BATCH) -> Iterator[NDArray[np.int64]]:
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
        self.wake(runs)

    def wake(self, runs: Runs) -> None:
        """Have whoever waits for pages of runs ask again."""
        self._everywhere("UFFDIO_WAKE", runs)

    def protect(self, runs: Runs, protected: bool) -> None:
        """Write-protect runs, or lift that and wake who waits to write; what a disk held of them is not known on."""
        if self._on_disk is not None:
            for first, count in runs.tolist():
                self._on_disk.known[first : first + count] = 0
        self._everywhere("UFFDIO_WRITEPROTECT", runs, int(protected))

    def punch(self, runs: Runs) -> bool:
        """Free the memory of runs in the guest's file.

        :return: whether all of them are absent: parts of large pages that somebody holds on to are present, and zeros.
        :raise KernelError: the kernel refused.
        """
        answer = batches.punch(self._regions, runs)
        if answer == -errno.EBUSY:
            return False
        self._ask("fallocate(PUNCH_HOLE)", answer)
        return True

    def read(self, runs: Runs, content: NDArray[np.uint8]) -> None:
        """Read runs that are in the guest's file.

        :raise KernelError: the kernel refused.
        """
        self._ask("pread", batches.read(self._regions, runs, content))

    def read_and_look(self, runs: Runs, content: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """:meth:`read`; which pages are all zeros, and the digests of the others.

        :raise KernelError: the kernel refused.
        """
        zero = np.empty(content.size // PAGE_SIZE, dtype=np.bool_)
        digests = np.empty(zero.size, dtype=np.uint64)
        self._ask("pread", batches.read_and_look(self._regions, runs, content, zero, digests))
        return zero, digests

    def place(self, runs: Runs, content: NDArray[np.uint8], *, over: bool = False) -> None:
        """Enter pages that are absent; what is present already stays, or is written ``over``.

        :raise KernelError: the kernel refused.
        """
        self._ask("UFFDIO_COPY", batches.place(self._clamp.uffd.fileno(), self._regions, runs, content, over))

    def runs_of(self, numbers: NDArray[np.int64]) -> Runs:
        """Runs of page numbers, which ascend; none across an edge of regions."""
        return batches.runs_of(self._regions, np.ascontiguousarray(numbers))

    def evict(self, pages: PageSet, to: Where) -> int:
        """Move those of ``pages`` that are resident into a store, while the guest runs; how many went.

        A page that is being fetched this very moment stays; so does a batch with parts of a large page that somebody
        holds on to (DMA), which cannot be split.

        :param to: ``Where.POOL`` or ``Where.FILE``.
        :raise StoreFullError: there is no room; what has not gone is where it was.
        :raise KernelError: the kernel refused; a page is where it was or where it was going, never neither.
        """
        return self._eviction.evict(pages, to, self._stores[to])

    def _kinds(self) -> list[Where]:
        """Where pages may be that can be brought back."""
        return [*self._stores, *([] if self._on_disk is None else [Where.DISK])]

    def _read(self, numbers: NDArray[np.int64], at: Where, content: NDArray[np.uint8]) -> None:
        locators = self.residency.locator[numbers]
        if at is Where.DISK and self._on_disk is not None:
            self._on_disk.store.fetch(locators, self._on_disk.digests[numbers], content)
        else:
            self._stores[at].fetch(locators, content)

    def fetch(self, pages: PageSet) -> int:
        """Bring those of ``pages`` that are in stores back, ahead of a fault; how many came.

        :raise DamagedPageError: one or more are not what was put away; all others have come.
        :raise KernelError: the kernel refused.
        """
        came = 0
        damage: DamagedPageError | None = None
        for where in self._kinds():
            for claimed in self.claims(pages & self.residency.pages_at(where)):
                # A fault may have brought some between the look and the claim.
                numbers = np.ascontiguousarray(claimed[self.residency.where[claimed] == where])
                try:
                    self._bring_back(numbers, where)
                    came += numbers.size
                except DamagedPageError as error:
                    damage = error
                    came += self._bring_what_is_whole(numbers, where)
                finally:
                    self.give_up(claimed)
        self._fetched += came
        if damage is not None:
            raise damage
        return came

    def _bring_back(self, numbers: NDArray[np.int64], at: Where) -> None:
        content = self._staging[: numbers.size * PAGE_SIZE]
        self._read(numbers, at, content)
        runs = self.runs_of(numbers)
        self.place(runs, content)
        self.residency.returned(numbers)
        if at is not Where.DISK:
            self._stores[at].drop(self.residency.locator[numbers])

    def _bring_what_is_whole(self, numbers: NDArray[np.int64], at: Where) -> int:
        came = 0
        for page in np.split(numbers, numbers.size):
            with contextlib.suppress(DamagedPageError):
                self._bring_back(page, at)
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

    def capture(self, spill: int, ring: int = RING) -> Capture:
        """Prepare an image of the memory, to be taken at an instant; :meth:`end_capture` it whatever becomes of it.

        :param spill: a file of the caller's, for pages that do not fit in memory; :param ring: pages that do.
        :raise RefusedError: ``shared``: some of it is mapped from a sharing pool, and not in the guest's file.
        :raise KernelError: the kernel refused; nothing is protected.
        """
        if self.overlay is not None or self.residency.count(Where.SHARED):
            raise RefusedError("shared", f"{self.guest.name}: pages that it shares are in no file of its own")
        image = Capture(
            self.residency,
            self._regions,
            self._kinds(),
            self._read,
            self.claims,
            self.give_up,
            self._split,
            partial(self._everywhere, "UFFDIO_WRITEPROTECT"),
            self._faults.meanwhile,
            spill,
            ring,
        )
        if self._on_disk is not None:
            # The image lifts every protection once it has the page.
            self._on_disk.known[:] = 0
        self._faults.exchange(self._table(image.saving))
        try:
            image.arm()
        except BaseException:
            self.end_capture(image)
            raise
        return image

    def end_capture(self, image: Capture) -> None:
        """Let everybody write again, whether or not the image is complete."""
        self._faults.exchange(self._table(saving.nothing()))
        if image.saving.pending.any():
            self._everywhere("UFFDIO_WRITEPROTECT", self.whole(), 0)

    def release(self) -> None:
        """Make everything resident and let the guest go: its memory is its own again. Idempotent.

        :raise DamagedPageError, KernelError: as :meth:`fetch`; the guest is still managed then.
        """
        self.stop_sharing()
        while any(self.residency.count(where) for where in self._kinds()):
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

    def wanted_rows(self) -> NDArray[np.int64]:
        """The rows of the snapshot that somebody waited for, in that order."""
        order = self._rows[1].order
        found: NDArray[np.int64] = order[1 : 1 + int(order[0])].copy() if order.size else order
        return found

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
            disk=counts[Where.DISK],
            snapshot=counts[Where.SNAPSHOT],
            shared=counts[Where.SHARED],
            evicted=self._eviction.evicted,
            zeros=self._eviction.zeros,
            fetched=self._fetched,
            faults=self._faults.statistics(),
        )
