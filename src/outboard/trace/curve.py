"""The miss-rate curve from sampled traces: how often an LRU memory of each size would miss.

Theory
------
A page alternates between *untraced* and *traced*. While it is untraced it is armed at a rate of our choosing that
depends on nothing but us: in each short time dt with the probability dt / delay, so that the untraced time is random,
exponential with the mean ``delay``. While it is traced its first access is seen, which makes it untraced again. All
that we have are spans: how long a page had been traced when it was touched, ``T``, and the ``delay`` it was armed with.

Take an access, and let ``g`` be the time since the same page's access before (its gap). Just after that one the page
was untraced, whatever came before. So it was armed after a time U, exponential; if U < g our access ends a span with
T = g - U, otherwise nobody saw it. Let each span contribute ``delay`` at x = T and 1 at each x < T. The expectation of
that at any x below g is exp(-(g - x)/delay) + 1 - exp(-(g - x)/delay) = 1, and 0 beyond. Hence, over the sampled pages,
the sum of the contributions at x estimates **how many accesses had a gap longer than x**, without bias, for any pattern
of accesses, hits on untraced pages included (Horvitz and Thompson 1952). By the time in which such an access could have
been seen, which is the length of the trace less x, and by the share of pages that is sampled, it is the rate ``m(x)``.

``m(x)`` is the miss rate of a working-set memory with window x, and its mean size is ``W(x)``, the integral of m from 0
to x (Denning and Schwartz 1972). An LRU memory of c pages is, on average, a working-set memory whose window is such
that W(x) = c; so **misses/s at c is W'(x) where W(x) = c**. W is concave, so the estimate is replaced by its least
concave majorant (Grenander 1956), and the slope is taken over a hundredth of its height to each side. The working set
over a window of x seconds is W(x).

Time is the guest's own: how long its processors have worked. At the end, rates are turned into those by the clock.

The accesses themselves are not seen: the *ratio* of misses needs the rate of accesses from elsewhere.

What is kept is two histograms of spans over the logarithm of T, in a few groups of pages; the groups, drawn again with
replacement, give the confidence bands (a bootstrap over pages).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GROUPS = 12
_PER_DECADE, _FIRST_S, _DECADES = 128, 1e-5, 8
_BINS = _PER_DECADE * _DECADES
_WIDTH = 0.01
_DRAWS = 64
_BAND = (5, 95)


def _edges() -> Floats:
    """Upper edges of the bins, in seconds; the first begins at 0, the last has no end."""
    return _FIRST_S * 10.0 ** (np.arange(_BINS) / _PER_DECADE)


@dataclass(frozen=True, slots=True)
class MissRateCurve:
    """Misses per second of an LRU memory, by its size.

    ``sizes`` in pages, ascending; ``misses`` per second, with a 90 % confidence band from ``low`` to ``high``.
    ``horizon``: the size in pages up to which there is evidence; beyond it the last rate is repeated.
    """

    sizes: Floats
    misses: Floats
    low: Floats
    high: Floats
    horizon: float
    spans: int
    seconds: float

    def ratio(self, accesses_per_s: float) -> Floats:
        """Misses per access at each size, given the rate of accesses, which a trace cannot know."""
        return np.minimum(1.0, self.misses / accesses_per_s)


class SpanHistogram:
    """Ended spans, by how long they were and by the group of their page.

    Synchronization: none.
    """

    def __init__(self) -> None:
        self._delays: NDArray[np.float32] = np.zeros((GROUPS, _BINS), dtype=np.float32)
        self._counts: NDArray[np.float32] = np.zeros((GROUPS, _BINS), dtype=np.float32)

    def add(self, groups: NDArray[np.integer], spans: Floats, delays: Floats) -> None:
        """Count spans: each page's group, how long it was traced until its access, and the mean untraced time that it
        was armed with; seconds."""
        where = np.clip(np.searchsorted(_EDGES, spans), 0, _BINS - 1)
        np.add.at(self._delays, (groups, where), delays)
        np.add.at(self._counts, (groups, where), 1)

    def merge(self, other: SpanHistogram) -> None:
        """Count the spans of another histogram too."""
        self._delays += other._delays
        self._counts += other._counts

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._delays.nbytes + self._counts.nbytes

    def growth(self) -> Floats:
        """For each group and bin, what its spans contribute to the integral of m over the bin; page-seconds."""
        longer = self._counts.sum(axis=1, keepdims=True, dtype=np.float64) - np.cumsum(
            self._counts, axis=1, dtype=np.float64
        )
        # Those that end within a bin cover half of it.
        grown: Floats = self._delays + (longer + self._counts / 2) * np.diff(_EDGES, prepend=0.0)
        return grown

    @property
    def spans(self) -> int:
        """How many there are."""
        return int(self._counts.sum(dtype=np.float64))


_EDGES = _edges()


@dataclass(frozen=True, slots=True)
class Exposure:
    """When spans were gathered: for ``seconds`` in which the guest ran for ``ran`` seconds, by a trace in whose time it
    has run for ``age`` seconds, of ``sampled`` of ``pages`` pages."""

    seconds: float
    ran: float
    age: float
    sampled: int
    pages: int

    def ran_at(self, windows: Floats) -> Floats:
        """For how long an access with a gap longer than each window could have been seen."""
        return np.minimum(self.ran, self.age - windows)


def working_set(histogram: SpanHistogram, exposure: Exposure) -> tuple[Floats, Floats]:
    """W: windows in seconds, and the mean number of pages touched within each."""
    windows, sizes = _grown(histogram.growth().sum(axis=0), exposure)
    return _majorant(windows, sizes)


def _grown(growth: Floats, exposure: Exposure) -> tuple[Floats, Floats]:
    # What is longer than half the trace has hardly been seen.
    known = max(1, int(np.searchsorted(_EDGES, exposure.age / 2)))
    windows = _EDGES[:known]
    steps = growth[:known] * (exposure.pages / exposure.sampled) / exposure.ran_at(windows)
    return np.concatenate(([0.0], windows)), np.concatenate(([0.0], np.cumsum(steps)))


def _majorant(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The corners of the least concave function that lies on or above the points, x ascending."""
    corners: list[int] = []
    for index in range(len(x)):
        while len(corners) > 1:
            before, last = corners[-2], corners[-1]
            if (y[last] - y[before]) * (x[index] - x[before]) > (y[index] - y[before]) * (x[last] - x[before]):
                break
            corners.pop()
        corners.append(index)
    return x[corners], y[corners]


def _misses(windows: Floats, filled: Floats, sizes: Floats) -> Floats:
    """The slope of W where it reaches each size."""
    most = filled[-1]
    if not most:
        return np.zeros(len(sizes))
    width = most * _WIDTH
    low = np.clip(sizes - width, 0, most - 2 * width)
    high = np.minimum(sizes + width, most)
    # W does not fall, and where it stays level only its last corner is left out here.
    rising = np.concatenate(([True], np.diff(filled) > 0))
    at = np.interp(np.stack((low, high)), filled[rising], windows[rising])
    slopes: Floats = (high - low) / (at[1] - at[0])
    last = (filled[-1] - filled[-2]) / (windows[-1] - windows[-2])
    return np.where(sizes < most, slopes, last)


def curve(histogram: SpanHistogram, exposure: Exposure, sizes: Floats, rng: np.random.Generator) -> MissRateCurve:
    """The curve that the spans tell of.

    :param sizes: at which it is wanted, in pages.
    :param rng: draws the groups for the bands.
    """
    growth = histogram.growth()
    windows, filled = _majorant(*_grown(growth.sum(axis=0), exposure))
    drawn = [
        _misses(*_majorant(*_grown(growth[rng.integers(GROUPS, size=GROUPS)].sum(axis=0), exposure)), sizes)
        for _ in range(_DRAWS)
    ]
    by_the_clock = exposure.ran / exposure.seconds
    low, high = np.percentile(drawn, _BAND, axis=0) * by_the_clock
    return MissRateCurve(
        sizes,
        _misses(windows, filled, sizes) * by_the_clock,
        low,
        high,
        float(filled[-1]),
        histogram.spans,
        exposure.seconds,
    )
