"""Sampling a guest's accesses for its miss-rate curve, within a budget.

A random set of pages, chosen by a hash of their numbers, is all that is ever traced. In each short step a few of those
that are untraced are drawn and armed: as many as the budget allows for the time that has passed, whichever they are. So
the budget is kept by itself: pages that are never touched stay armed and cost nothing more, and the more of them there
are, the sooner the others are armed again. The mean untraced time of the moment is kept with each page that is armed.

Spans are counted in the guest's own processor time, not by the clock: while it does not run, it touches nothing, and a
pattern keeps its shape however often other work takes the processor away. Rates are told by the clock again.

A guest of any size takes less than 1 MiB here; the trace itself has one byte for each page of the guest besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.trace.curve import GROUPS, Exposure, MissRateCurve, SpanHistogram, curve, working_set

MOST = 8_192
"""Pages sampled at most."""
_STEP_S = 0.01
_AT_A_TIME = 64
_IDLE = 0.1
_CHUNK = 1 << 20


class Traced(Protocol):
    """What is needed of a trace: :class:`outboard.trace.accesses.AccessTrace`, or a model of one."""

    def arm_each(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

    def take(self) -> NDArray[np.void]: ...

    def ran(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """What tracing may cost: at most ``traps`` a second, and at most ``slowdown``, a fraction of the time in which the
    guest runs. A guest that runs for less than a tenth of the time counts as one that runs for a tenth.

    ``trap_s``: what a trap costs the guest, in seconds.
    """

    trap_s: float
    slowdown: float = 0.02
    traps: float = float("inf")

    def afforded(self, elapsed: float, ran: float) -> float:
        """How many traps there may be in ``elapsed`` seconds, in which the guest ran for ``ran`` seconds."""
        return min(self.traps * elapsed, self.slowdown * max(ran, elapsed * _IDLE) / self.trap_s)


@dataclass(frozen=True, slots=True)
class SamplerStatistics:
    """``sampled`` pages, of which ``armed`` are armed now; ``delay``: the mean untraced time in seconds now; ``arms``
    and ``traps`` so far; ``state``: bytes held."""

    sampled: int
    armed: int
    delay: float
    arms: int
    traps: int
    state: int


def sample(pages: int, unit: int = 1, most: int = MOST) -> NDArray[np.int64]:
    """Page numbers below ``pages``, multiples of ``unit``: ``most`` or a little fewer, by a hash (splitmix64)."""
    count = pages // unit
    share = min(1.0, most / max(1, count))
    found: list[NDArray[np.int64]] = []
    for first in range(0, count, _CHUNK):
        numbers = np.arange(first, min(count, first + _CHUNK), dtype=np.uint64)
        mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        found.append(numbers[mixed.astype(np.float64) / 2**64 < share].astype(np.int64) * unit)
    return np.concatenate(found)[:most] if found else np.empty(0, dtype=np.int64)


class Sampler:
    """Traces a sample of a guest's pages and keeps what its curve is made of.

    :param trace: in which nothing else is armed.
    :param pages: the sample; :param of: how many pages it stands for.
    :param clock: nanoseconds, the trace's.

    Synchronization: one thread.
    """

    def __init__(
        self,
        trace: Traced,
        pages: NDArray[np.int64],
        of: int,
        budget: Budget,
        rng: np.random.Generator,
        clock: Callable[[], int],
    ) -> None:
        self._trace, self._budget, self._rng, self._clock = trace, budget, rng, clock
        self._pages, self._of = pages, of
        self._since: NDArray[np.int64] = np.zeros(len(pages), dtype=np.int64)
        self._delays: NDArray[np.float32] = np.zeros(len(pages), dtype=np.float32)
        # The untraced ones first, in no order.
        self._order: NDArray[np.int32] = np.arange(len(pages), dtype=np.int32)
        self._place: NDArray[np.int32] = np.arange(len(pages), dtype=np.int32)
        self._untraced = len(pages)
        self._arms = self._traps = 0
        self._delay = float("inf")
        # Moments are pairs: the clock, and how long the guest had run.
        self._began = self._cut = self._then = (clock(), trace.ran())
        self._pace = 1.0
        self._before = SpanHistogram()
        self._now = SpanHistogram()

    def step(self) -> float:
        """Take what was seen, and arm what is due; how long to sleep until the next call, in seconds."""
        now = (self._clock(), self._trace.ran())
        elapsed, ran = max(1, now[0] - self._then[0]) / 1e9, (now[1] - self._then[1]) / 1e9
        self._pace = ran / elapsed
        self._then = now
        self._take()
        wanted = min(self._budget.afforded(elapsed, ran), _AT_A_TIME, self._untraced)
        if wanted > 0:
            self._delay = ran * self._untraced / wanted
            self._arm(int(wanted + self._rng.random()))
        # Irregular, so that no rhythm of the guest's can be ours.
        return float(self._rng.uniform(0.5, 1.5)) * _STEP_S

    def _take(self) -> None:
        found = self._trace.take()
        if not len(found):
            return
        slots = np.searchsorted(self._pages, found["page"])
        # As near as the moment is known; never before the page was armed.
        spans = found["ran"] - self._since[slots] - (found["at"] - found["after"]) * (self._pace / 2)
        spans = np.maximum(0, spans) / 1e9
        self._now.add(slots % GROUPS, spans, self._delays[slots].astype(np.float64))
        self._traps += len(found)
        for slot in slots.tolist():
            self._swap(slot, self._untraced)
            self._untraced += 1

    def _arm(self, count: int) -> None:
        drawn = self._rng.choice(self._untraced, min(count, self._untraced), replace=False, shuffle=False)
        slots = np.sort(self._order[drawn])
        if not len(slots):
            return
        armed, since = self._trace.arm_each(self._pages[slots])
        slots = slots[np.isin(self._pages[slots], armed, assume_unique=True)]
        self._since[slots], self._delays[slots] = since[:, 1], self._delay
        self._arms += len(slots)
        for slot in slots.tolist():
            self._untraced -= 1
            self._swap(slot, self._untraced)

    def _swap(self, slot: int, place: int) -> None:
        order, places = self._order, self._place
        other, here = order[place], places[slot]
        order[place], order[here] = slot, other
        places[slot], places[other] = place, here

    def _exposure(self, since: tuple[int, int]) -> Exposure:
        clock, ran = self._then
        return Exposure(
            max(1, clock - since[0]) / 1e9,
            max(1, ran - since[1]) / 1e9,
            max(1, ran - self._began[1]) / 1e9,
            len(self._pages),
            self._of,
        )

    def _all(self) -> SpanHistogram:
        whole = SpanHistogram()
        whole.merge(self._before)
        whole.merge(self._now)
        return whole

    def horizon(self) -> float:
        """The size up to which there is evidence, in pages."""
        return float(working_set(self._all(), self._exposure(self._began))[1][-1])

    def curve(self, sizes: NDArray[np.float64]) -> MissRateCurve:
        """The curve over all the time so far, at ``sizes`` in pages."""
        return curve(self._all(), self._exposure(self._began), sizes, self._rng)

    def cut(self, sizes: NDArray[np.float64]) -> MissRateCurve:
        """The curve over the time since the last call, which is a window of its own."""
        found = curve(self._now, self._exposure(self._cut), sizes, self._rng)
        self._before.merge(self._now)
        self._now = SpanHistogram()
        self._cut = self._then
        return found

    def working_set(self, windows: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many pages are touched within each window, in seconds, on average over all the time so far; not a number
        where the window is much longer than half of it."""
        exposure = self._exposure(self._began)
        known, sizes = working_set(self._all(), exposure)
        known = known * exposure.seconds / exposure.ran
        found: NDArray[np.float64] = np.interp(windows, known, sizes)
        # The last bin that is known may end a little before.
        found[windows > known[-1] * 1.1] = np.nan
        return found

    def statistics(self) -> SamplerStatistics:
        """A frozen snapshot."""
        held = (self._pages, self._since, self._delays, self._order, self._place, self._before, self._now)
        return SamplerStatistics(
            len(self._pages),
            len(self._pages) - self._untraced,
            self._delay,
            self._arms,
            self._traps,
            sum(one.nbytes for one in held),
        )
