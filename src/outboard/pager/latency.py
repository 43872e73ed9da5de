"""How long faults took: a histogram in shared memory with buckets 4.4 % wide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
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


@njit("void(uint64[::1], int64)", cache=True, nogil=True)
def record(counts: NDArray[np.uint64], nanoseconds: int) -> None:
    """Count a fault in the live array of a histogram, also from compiled code."""
    bucket = int(math.log2(max(nanoseconds, 1)) * _PER_OCTAVE)
    counts[min(bucket, counts.size - 1)] += np.uint64(1)


class LatencyHistogram:
    """The live histogram; ``counts`` is its array.

    Synchronization: one process writes, any reads; made before they are forked.
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts: NDArray[np.uint64] = shared_array(_BUCKETS, np.uint64)

    def record(self, nanoseconds: int) -> None:
        """Count one fault."""
        record(self.counts, nanoseconds)

    def statistics(self) -> Latencies:
        """A frozen snapshot."""
        return Latencies(self.counts.copy())
