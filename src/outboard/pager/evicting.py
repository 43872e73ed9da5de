"""Eviction: pages of a running guest go into a store, in batches of which several are under way at once."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from outboard.pager.keeper import BATCH, Keeper
from outboard.pager.on_disk import OnDisk
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.pages.shared import shared_array
from outboard.stores.store import Store

_LANES = 3
"""Batches that are evicted side by side."""
_NOWHERE = np.empty(0, dtype=np.uint64)


class Eviction:
    """Evicts pages of the guest that ``keeper`` keeps; those that a disk holds go nowhere.

    :ivar evicted: how many pages went so far; :ivar zeros: of these, that were all zeros.

    Synchronization: the pager's thread, which has others work for it meanwhile.
    """

    def __init__(self, keeper: Keeper, on_disk: OnDisk | None) -> None:
        self._keeper, self._on_disk = keeper, on_disk
        # On whole pages, as files that go past the page cache ask.
        self._staging: NDArray[np.uint8] = shared_array(BATCH * PAGE_SIZE, np.uint8)
        self._counting = threading.Lock()
        self.evicted = self.zeros = 0

    def evict(self, pages: PageSet, to: Where, store: Store) -> int:
        """See :meth:`outboard.pager.pager.Pager.evict`."""
        candidates = pages & self._keeper.residency.pages_at(Where.RESIDENT)
        if len(candidates) <= BATCH:
            return sum(
                self._evict_batch(claimed, to, store, self._staging) for claimed in self._keeper.claims(candidates)
            )
        return self._evict_side_by_side(candidates, to, store)

    def _evict_side_by_side(self, candidates: PageSet, to: Where, store: Store) -> int:
        """While one batch is written to the disk the next one is read out of the guest."""
        stagings = [self._staging, *(shared_array(BATCH * PAGE_SIZE, np.uint8) for _ in range(_LANES - 1))]
        flying: deque[tuple[Future[int], NDArray[np.uint8]]] = deque()
        went = 0
        with ThreadPoolExecutor(_LANES) as lanes:
            for claimed in self._keeper.claims(candidates):
                flying.append((lanes.submit(self._evict_batch, claimed, to, store, stagings[-1]), stagings.pop()))
                if not stagings:
                    batch, staging = flying.popleft()
                    # What is still under way is waited for when this one has failed.
                    went += batch.result()
                    stagings.append(staging)
            went += sum(batch.result() for batch, _ in flying)
        return went

    def _evict_batch(self, claimed: NDArray[np.int64], to: Where, store: Store, staging: NDArray[np.uint8]) -> int:
        try:
            return self._put_away(claimed, to, store, staging)
        finally:
            self._keeper.give_up(claimed)

    def _put_away(self, numbers: NDArray[np.int64], to: Where, store: Store, staging: NDArray[np.uint8]) -> int:
        residency = self._keeper.residency
        runs = self._keeper.runs_of(numbers)
        content = staging[: numbers.size * PAGE_SIZE]
        try:
            self._keeper.protect(runs, True)
            zero, digests = self._keeper.read_and_look(runs, content)
            if self._on_disk is None:
                on_disk, blocks = np.zeros(numbers.size, dtype=np.bool_), _NOWHERE
            else:
                on_disk, blocks = self._on_disk.look_up(numbers, content, zero)
            nowhere = zero | on_disk
            kept = content
            if nowhere.any():
                kept, digests = content.reshape(-1, PAGE_SIZE)[~nowhere].reshape(-1), digests[~nowhere]
            locators = store.put(kept, digests)
        except BaseException:
            self._keeper.protect(runs, False)
            raise
        residency.leaving[numbers] = 1
        residency.went(numbers[~nowhere], to, locators)
        residency.went(numbers[on_disk], Where.DISK, blocks)
        residency.where[numbers[zero]] = Where.ZERO
        gone = self._keeper.punch(runs)
        if not gone:
            self._keeper.place(runs, content, over=True)
            residency.returned(numbers)
            store.drop(locators)
        residency.leaving[numbers] = 0
        if gone:
            with self._counting:
                self.evicted += numbers.size
                self.zeros += int(np.count_nonzero(zero))
        return numbers.size if gone else 0
