"""How long faults took: a histogram in shared memory with buckets 4.4 % wide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.pages.shared import shared_array

_PER_OCTAVE = 16
_BUCKETS = 40 * _PER_OCTAVE
"""Up to 2**40 ns, eighteen minutes; what took longer is counted in the last."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """A frozen histogram; ``counts[i]`` faults took about ``2 ** (i / 16)`` ns."""

    counts: NDArray[np.uint64]

    @property
    def count(self) -> int:
        """How many faults there were."""
        return int(self.counts.sum())

    def percentile_us(self, share: float) -> float | None:
        """The time in microseconds that ``share`` (0 to 1) of the faults did not exceed, to within 4.4 %."""
        if not self.count:
            return None
        rank = max(1, math.ceil(share * self.count))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(2 ** ((bucket + 1) / _PER_OCTAVE)) / 1000


class LatencyHistogram:
    """The live histogram.

    Synchronization: one process writes, any reads; made before they are forked.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: NDArray[np.uint64] = shared_array(_BUCKETS, np.uint64)

    def record(self, nanoseconds: int) -> None:
        """Count one fault."""
        self._counts[min(_BUCKETS - 1, int(math.log2(max(nanoseconds, 1)) * _PER_OCTAVE))] += np.uint64(1)

    def statistics(self) -> Latencies:
        """A frozen snapshot."""
        return Latencies(self._counts.copy())
