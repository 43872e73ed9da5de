"""An access trace over accesses that are known beforehand, on a clock that only we move."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from outboard.pages.traps import ACCESS


class SimulatedTrace:
    """``accesses`` at ``rate`` a second; an access is told of as late, and known as well, as a sixteenth of its page's
    age. ``now`` is in seconds, of which the guest runs for the part ``running``."""

    def __init__(self, accesses: NDArray[np.int32], pages: int, rate: float, seed: int, running: float = 1.0) -> None:
        self._running = running
        self.now = 0.0
        self.arms = 0
        self._rate = rate
        self._rng = np.random.default_rng(seed)
        self._order = np.argsort(accesses, kind="stable")
        self._starts = np.searchsorted(accesses[self._order], np.arange(pages + 1))
        self._coming: list[tuple[float, float, int]] = []

    def clock(self) -> int:
        return int(self.now * 1e9)

    def ran(self) -> int:
        return int(self.clock() * self._running)

    def arm_each(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        for page in pages.tolist():
            touched = self._order[self._starts[page] : self._starts[page + 1]]
            next_one = np.searchsorted(touched, self.now * self._rate)
            if next_one < len(touched):
                at = touched[next_one] / self._rate
                part = (at - self.now) / 16
                late = part * self._rng.random()
                heapq.heappush(self._coming, (at + late, at + late - part, page))
        self.arms += len(pages)
        return pages, np.full((len(pages), 2), (self.clock(), self.ran()))

    def take(self) -> NDArray[np.void]:
        found = []
        while self._coming and self._coming[0][0] <= self.now:
            at, after, page = heapq.heappop(self._coming)
            found.append((page, int(after * 1e9), int(at * 1e9), int(at * 1e9 * self._running), 0))
        return np.array(found, dtype=ACCESS)
