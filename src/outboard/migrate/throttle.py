"""When and how much a guest's writers are held back so that a migration in rounds ends.

The model
---------
A round sends R pages at L pages a second and so takes R/L seconds, in which the guest writes to W(R/L) different pages:
they are the next round's R. W is measured in each round by looking at the write trace a few times: it rises steeply
and then bends, since what is written again costs nothing more. A guest whose writers get the share s of their
processor time writes in t seconds what it would have written in s t: W(s t). By how much this guest writes more, the
*gain*, is what a throttled round left over what was predicted; it is kept with the migration, and is where the next
one of the VM begins. One that writes less has calmed down, and W is what it writes now.

The migration may end with the first R that can be sent in the pause, and ends when a further round would no longer
shorten the pause by much. For each share the rounds are played through; of the shares with which they end, the one is
taken whose cost is least::

    cost = (seconds left) * (1 - s) + IMPATIENCE * (seconds left) + SLUGGISH * (1/s - 1)

that is, the guest's work that is lost, the time itself, of which a second counts as a quarter second lost, and that
whoever asks the guest for what takes it 0.2 s of processor time waits 1/s times as long. So a guest that converges by
itself in good time is left alone, and one that does not is held back hard and briefly rather than mildly and long. That
is decided anew after each round, and given up as soon as nothing calls for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from outboard.errors import OutboardError
from outboard.migrate.report import Slowed

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
IMPATIENCE = 0.25
SLUGGISH = 0.2
_MOST_ROUNDS = 100
_SHRINKS = 0.98
"""Rounds that leave more than this part of the one before do not end."""
_MOST_GAIN = 4.0
_WELL_BELOW = 0.5
_HALVES = 0.5
_WORTH_S = 0.01
"""What one more round must take off the pause."""


class Growth:
    """How many different pages the guest writes to within a time, from looks at its write trace.

    Synchronization: none.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = [0.0]
        self._pages: list[float] = [0.0]

    def note(self, seconds: float, pages: int) -> None:
        """``pages`` had been written to ``seconds`` after the trace was armed, had nobody held the guest back.

        What was known of as long a time or a longer one is forgotten: the guest may do something else by now.
        """
        at = bisect_left(self._seconds, seconds, lo=1)
        del self._seconds[at:], self._pages[at:]
        self._seconds.append(seconds)
        self._pages.append(max(self._pages[-1], float(pages)))

    def within(self, seconds: float) -> float:
        """Pages written to within ``seconds``; beyond what was seen, at the last rate that was."""
        known = len(self._seconds)
        if known == 1:
            return 0.0
        at = min(max(1, bisect_left(self._seconds, seconds)), known - 1)
        t0, t1, w0, w1 = self._seconds[at - 1], self._seconds[at], self._pages[at - 1], self._pages[at]
        return w0 + (w1 - w0) * (seconds - t0) / (t1 - t0)

    @property
    def rate(self) -> float | None:
        """Pages/s at first, before any is written to again; None before the first look."""
        return self._pages[1] / self._seconds[1] if len(self._seconds) > 1 else None


@dataclass(frozen=True, slots=True)
class Forecast:
    """With the writers held to ``share``, the rounds would end in ``seconds``; infinite: never."""

    share: float
    seconds: float

    @property
    def cost(self) -> float:
        """Seconds, as the module says."""
        return self.seconds * (1 - self.share + IMPATIENCE) + SLUGGISH * (1 / self.share - 1)


def forecast(growth: Growth, left: float, rate: float, goal: float, share: float, gain: float = 1.0) -> Forecast:
    """Play the rounds through.

    :param left: pages that the next round sends; :param rate: pages/s; :param goal: pages that the pause can take.
    """
    seconds = 0.0
    for _ in range(_MOST_ROUNDS):
        took = left / rate
        seconds += took
        written = gain * growth.within(share * took)
        if written <= goal:
            return Forecast(share, seconds)
        if written > _SHRINKS * left:
            break
        left = written
    return Forecast(share, math.inf)


def choose(growth: Growth, left: float, rate: float, goal: float, gain: float = 1.0, most: float = 1.0) -> Forecast:
    """The share up to ``most`` that costs least; the smallest that there is when none helps.

    Whoever is held back already is let go altogether, when what it would write in the next round is well below the
    goal, or not at all: near the goal a forecast is not as good as that.
    """
    if most < 1 and growth.within(left / rate) < _WELL_BELOW * goal:
        return Forecast(1.0, left / rate)
    found = [forecast(growth, left, rate, goal, share, gain) for share in SHARES if share <= most]
    best = min(found, key=lambda one: (one.cost, -one.share))
    return best if math.isfinite(best.cost) else found[-1]


class Holding(Protocol):
    """What holds threads back: :class:`outboard.vmm.brake.Brake`, or a trace that lets writers wait."""

    def hold(self, share: float) -> None: ...

    def release(self) -> None: ...


@dataclass(slots=True)
class Throttle:
    """Decides after each round, and holds the writers back as decided.

    :param find: who writes, found out when it is first needed: what holds them back, and their vCPUs, in words.
    :param gain: of the VM's migration before.

    ``steps`` tells what was done, and why.

    Synchronization: one thread.
    """

    find: Callable[[], tuple[Holding, str]]
    gain: float = 1.0
    growth: Growth = field(default_factory=Growth)
    steps: list[Slowed] = field(default_factory=list)
    share: float = 1.0
    _brake: Holding | None = None
    _who: str = ""
    _expected: float | None = None
    _useless: bool = False

    def look(self, seconds: float, pages: int) -> None:
        """``pages`` had been written to ``seconds`` after the trace was armed."""
        seconds *= self.share
        # One that is held back and writes less than it should has calmed down; that it writes more the gain says.
        if seconds > 0 and (self.share == 1 or pages < self.growth.within(seconds)):
            self.growth.note(seconds, pages)

    def shortens(self, left: int, rate: float) -> bool:
        """Whether one more round would shorten the pause, which can take what is ``left``, by half and more."""
        if not rate:
            return False
        then = self.gain * self.growth.within(self.share * left / rate)
        return then <= _HALVES * left and left - then >= _WORTH_S * rate

    def steer(self, elapsed: float, left: int, rate: float, goal: float) -> None:
        """Judge the round that has just ended, and decide for the next.

        :param elapsed: since the migration began, in seconds; the others as in :func:`forecast`.
        """
        if self._useless:
            return
        if self._expected and self.share < 1:
            self.gain = min(_MOST_GAIN, max(1.0, self.gain * left / self._expected))
        chosen = choose(self.growth, left, rate, goal, self.gain, self.share)
        self._expected = self.gain * self.growth.within(chosen.share * left / rate)
        alone = forecast(self.growth, left, rate, goal, 1.0, self.gain)
        if chosen.share == self.share:
            return
        if self._brake is None:
            try:
                self._brake, self._who = self.find()
            except OutboardError as error:
                self._useless = True
                self.steps.append(Slowed(elapsed, 1.0, "", f"the writers cannot be held back: {error}"))
                return
        self._brake.hold(chosen.share)
        self.share = chosen.share
        self.steps.append(Slowed(elapsed, chosen.share, self._who, _why(chosen, alone, left, rate)))

    @property
    def words(self) -> str:
        """What is done now, and why."""
        last = self.steps[-1]
        return f"{last.who} held to {last.share:.0%}: {last.why}"

    def release(self, elapsed: float) -> None:
        """Let go. Idempotent."""
        brake, self._brake = self._brake, None
        if brake is not None:
            brake.release()
            if self.share < 1:
                self.share = 1.0
                self.steps.append(Slowed(elapsed, 1.0, self._who, "the migration is over"))


def _why(chosen: Forecast, alone: Forecast, left: int, rate: float) -> str:
    if chosen.share >= 1:
        return f"the rest converges by itself, in {alone.seconds:.1f} s"
    ends = f"in {chosen.seconds:.1f} s" if math.isfinite(chosen.seconds) else "not even so, as far as can be told"
    by_itself = f"in {alone.seconds:.1f} s" if math.isfinite(alone.seconds) else "never"
    return f"{left} pages are left at {rate:.0f} pages/s: rounds end {ends}, by themselves {by_itself}"


def usual(before: Mapping[int, float], after: Mapping[int, float], seconds: float) -> dict[int, float]:
    """The part of a processor that each thread took, from its processor time at two moments.

    A thread that hardly ran counts as one that takes a tenth: it may want more when it is due.
    """
    return {tid: min(1.0, max(0.1, (after[tid] - before[tid]) / seconds)) for tid in before if tid in after}
