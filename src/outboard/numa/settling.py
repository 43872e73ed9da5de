"""When a better placement is worth having: only if the gain lasts, outweighs what moving costs, and is not taken back.

A state machine as a table. STEADY becomes TEMPTED when an offer is worth it, and MOVING after it stayed so for ``hold``
seconds; MOVING becomes RESTING at once, whatever came of it, and RESTING becomes STEADY after ``rest`` seconds. A
placement that was left within ``window`` seconds is not gone back to, and for twice as long each time it was: two
loads that take turns do not drag a guest to and fro. The clock is passed in: seconds, from any origin.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import NamedTuple

import msgspec


class State(Enum):
    """Where a guest's placement stands."""

    STEADY = "steady"
    TEMPTED = "tempted"
    MOVING = "moving"
    RESTING = "resting"


TRANSITIONS: dict[State, set[State]] = {
    State.STEADY: {State.TEMPTED},
    State.TEMPTED: {State.STEADY, State.MOVING},
    State.MOVING: {State.RESTING},
    State.RESTING: {State.STEADY},
}
_MOST_RETURNS = 5


class Rules(msgspec.Struct, frozen=True):
    """Seconds, but for ``gain``: the part of the expected time of accesses that must be saved.

    :param payback: what a move costs must be gained back within this time.
    """

    gain: float = 0.08
    hold: float = 10.0
    rest: float = 30.0
    window: float = 300.0
    payback: float = 60.0


class Offer(NamedTuple):
    """Another placement; ``key`` tells it from others, such as by the node of each vCPU.

    :param now: the cost of the present one, and ``then`` of the other, in one unit.
    :param price: seconds of the guest's time that moving takes: stalls of its vCPUs, and slower accesses until its
        memory has followed.
    """

    here: Hashable
    key: Hashable
    now: float
    then: float
    price: float


class Decision(NamedTuple):
    """Whether to move, and why or why not, in words."""

    move: bool
    words: str


class Settler:
    """What is remembered of one guest's placements.

    Synchronization: none.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state = State.STEADY
        self._since = 0.0
        self._left: dict[Hashable, tuple[float, int]] = {}

    def _become(self, state: State, now: float) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a placement that is {self.state.value} cannot become {state.value}")
        self.state, self._since = state, now

    def _guarded(self, key: Hashable, now: float) -> float:
        """For how many more seconds a placement is not gone back to."""
        if key not in self._left:
            return 0.0
        left, returns = self._left[key]
        return max(0.0, left + self.rules.window * (1 << returns) - now)

    def _against(self, offer: Offer, now: float) -> str:
        """What speaks against an offer, or nothing."""
        rules = self.rules
        if offer.key == offer.here:
            return "it is the best placement there is"
        gain = 1 - offer.then / offer.now if offer.now > 0 else 0.0
        if gain < rules.gain:
            return (
                f"another placement would save {max(0.0, gain):.0%} of the time of accesses, less than {rules.gain:.0%}"
            )
        if gain * rules.payback < offer.price:
            return (
                f"moving costs {offer.price:.1f} s, and {gain:.0%} of the time of accesses does not make up for it "
                f"within {rules.payback:.0f} s"
            )
        wait = self._guarded(offer.key, now)
        if wait > 0:
            return f"the better placement was left lately; it is not gone back to for another {wait:.0f} s"
        return ""

    def consider(self, offer: Offer, now: float) -> Decision:
        """Judge an offer; whoever gets ``move`` moves, and the guest rests from then on."""
        if self.state is State.RESTING:
            left = self._since + self.rules.rest - now
            if left > 0:
                return Decision(False, f"it was moved lately and rests for another {left:.0f} s")
            self._become(State.STEADY, now)
        against = self._against(offer, now)
        if against:
            if self.state is State.TEMPTED:
                self._become(State.STEADY, now)
            return Decision(False, against)
        gain = 1 - offer.then / offer.now
        if self.state is State.STEADY:
            self._become(State.TEMPTED, now)
        lasted = now - self._since
        if lasted < self.rules.hold:
            words = (
                f"another placement would save {gain:.0%}; it must stay so for another {self.rules.hold - lasted:.0f} s"
            )
            return Decision(False, words)
        self._become(State.MOVING, now)
        _, returns = self._left.get(offer.key, (0.0, -1))
        if offer.key in self._left:
            self._left[offer.key] = (now, min(returns + 1, _MOST_RETURNS))
        self._leave(offer.here, now)
        self._become(State.RESTING, now)
        return Decision(True, f"another placement has saved {gain:.0%} of the time of accesses for {lasted:.0f} s")

    def _leave(self, here: Hashable, now: float) -> None:
        _, returns = self._left.get(here, (0.0, 0))
        longest = self.rules.window * (1 << _MOST_RETURNS)
        self._left = {key: one for key, one in self._left.items() if now - one[0] < longest}
        self._left[here] = (now, returns)
