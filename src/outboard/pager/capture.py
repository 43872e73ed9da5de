"""An image of a guest's memory as it was at one instant, taken while the guest runs on.

At the instant every page is write-protected (those that are absent or not mapped raise a fault anyway) and becomes
pending. Who writes to a pending page waits until that page has been saved, and no longer: the fault path saves it
(:mod:`outboard.pager.saving`). The background takes the others in the order of their addresses, a batch at a time:
claim, read, no longer pending, protection lifted, claims given up. Whoever claims a page first saves it; both put it
away before it can change, so that the image is that of the instant whatever the order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.pager import batches, saving
from outboard.pager.saving import PENDING, WRITTEN, ZERO_PLACE, Saving, Word
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.pageset import PageSet, Runs, chop
from outboard.pages.residency import Residency, Where

BATCH = 256
"""Pages that are handed out at a time, at most."""
_STEP = 4096
"""Pages that are protected in one call."""
RING = 16384
"""Pages that wait in memory, 64 MiB, before they wait in a file."""

Saved = tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]
"""Numbers of pages; their content, one after the other; which of them are all zeros."""


class Capture:
    """One image, of the instant of :meth:`take`; made by :meth:`outboard.pager.pager.Pager.capture`.

    :param kinds: where absent pages may be; :param fetch: reads some that are at one of these.
    :param claims: claims pages a batch at a time, :param let_go: gives them up, and wakes.
    :param split: cuts runs at the edges of regions.
    :param meanwhile: runs something while no fault is served.
    :param protect: protects runs (1), or lifts that (0).
    :param spill: a file for what does not fit in memory; the caller's.

    Synchronization: one thread, and no other that moves pages meanwhile; faults are served by theirs.
    """

    def __init__(
        self,
        residency: Residency,
        regions: NDArray[np.int64],
        kinds: Sequence[Where],
        fetch: Callable[[NDArray[np.int64], Where, NDArray[np.uint8]], None],
        claims: Callable[[PageSet], Iterator[NDArray[np.int64]]],
        let_go: Callable[[NDArray[np.int64]], None],
        split: Callable[[Runs], Runs],
        protect: Callable[[Runs, int], None],
        meanwhile: Callable[[Callable[[], None]], None],
        spill: int,
        ring: int,
    ) -> None:
        self._residency, self._regions = residency, regions
        self._kinds, self._fetch = kinds, fetch
        self._claims, self._let_go, self._split, self._protect = claims, let_go, split, protect
        self._meanwhile = meanwhile
        self.saving: Saving = saving.begin(residency.pages, ring, spill)
        self._spill = spill
        self._taken = 0
        self._buffer: NDArray[np.uint8] = np.empty(BATCH * PAGE_SIZE, dtype=np.uint8)

    def arm(self) -> None:
        """Protect all memory ahead of the instant, while the guest runs.

        :raise KernelError: the kernel refused.
        """
        whole = self._split(np.array([[0, self._residency.pages]], dtype=np.int64))
        for runs in np.array_split(chop(whole, _STEP), -(-self._residency.pages // _STEP)):
            self._protect(runs, 1)
        # Once now, so that at the instant there is nothing that is done for the first time.
        self._protect(self._runs(np.flatnonzero(self.saving.pending == WRITTEN)), 1)

    def take(self) -> None:
        """The instant is now. The image is one of several pages that agree if nobody writes meanwhile.

        :raise KernelError: the kernel refused.
        """
        self._meanwhile(self._take)

    def _take(self) -> None:
        pending = self.saving.pending
        self._protect(self._runs(np.flatnonzero(pending == WRITTEN)), 1)
        pending[:] = PENDING

    def _check(self) -> None:
        failure = int(self.saving.state[Word.FAILURE])
        if failure:
            raise KernelError("saving of a page of the image before its guest writes to it", failure)

    def from_faults(self) -> Iterator[Saved]:
        """What the fault path has saved since it was last asked.

        :raise KernelError: a page could not be saved, or read back: the image is lost.
        """
        room = max(1, self.saving.ring.size // PAGE_SIZE)
        while (end := int(self.saving.state[Word.RECORDS])) > self._taken:
            records = self.saving.records[self._taken : min(end, self._taken + BATCH)]
            numbers = records[:, 0].copy()
            places = records[:, 1]
            content: NDArray[np.uint8] = np.zeros((numbers.size, PAGE_SIZE), dtype=np.uint8)
            ringed = places >= 0
            content[ringed] = self.saving.ring.reshape(-1, PAGE_SIZE)[places[ringed] % room]
            for index in np.flatnonzero(places < ZERO_PLACE).tolist():
                at = (ZERO_PLACE - 1 - int(places[index])) * PAGE_SIZE
                if os.preadv(self._spill, [content[index].data], at) != PAGE_SIZE:
                    raise KernelError("read of a saved page", 5)
            self.saving.state[Word.TAIL] += int(np.count_nonzero(ringed))
            self._taken += numbers.size
            whole = content.reshape(-1)
            yield numbers, whole, zero_pages(whole)
        self._check()

    def sweep(self) -> Iterator[Saved]:
        """What nobody has written to, once through all that is pending; views that hold until the next is asked for.

        Pages that somebody is busy with are passed over: sweep until :attr:`complete`.

        :raise KernelError: a page cannot be read; the image is lost.
        :raise DamagedPageError: a store does not hold what was put there; the image is lost.
        """
        pending = self.saving.pending
        for claimed in self._claims(PageSet.from_mask(pending != 0)):
            # The fault path may have saved some between the look and the claim.
            ours = np.ascontiguousarray(claimed[pending[claimed] != 0])
            try:
                saved = self._read(ours)
                pending[ours] = 0
                self._protect(self._runs(ours), 0)
            finally:
                self._let_go(claimed)
            # Nothing is held while the caller is busy with these.
            yield saved

    def _runs(self, numbers: NDArray[np.int64]) -> Runs:
        return self._split(PageSet.from_numbers(self._residency.pages, numbers).runs())

    def _read(self, numbers: NDArray[np.int64]) -> Saved:
        """Pages that are claimed, wherever they are."""
        where = self._residency.where[numbers]
        parts = [numbers[where < Where.POOL]]
        content = self._buffer[: numbers.size * PAGE_SIZE]
        here = content[: parts[0].size * PAGE_SIZE]
        if here.size:
            answer = batches.read(self._regions, self._runs(parts[0]), here)
            if answer < 0:
                raise KernelError(f"read of {parts[0].size} pages of the image", -answer)
        at = here.size
        for kind in self._kinds:
            there = numbers[where == kind]
            if there.size:
                self._fetch(there, kind, content[at : at + there.size * PAGE_SIZE])
            parts.append(there)
            at += there.size * PAGE_SIZE
        return np.concatenate(parts), content, zero_pages(content)

    @property
    def complete(self) -> bool:
        """Whether no page is pending, and all that was saved has been asked for."""
        return not self.saving.pending.any() and int(self.saving.state[Word.RECORDS]) == self._taken
