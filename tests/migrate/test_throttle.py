"""The controller of the writers' processor time, against guests whose writes are a formula."""

from __future__ import annotations

import math

import pytest

from outboard.errors import KernelError
from outboard.migrate.throttle import SHARES, Growth, Holding, Throttle, choose, forecast, usual

LINK = 28_600.0
"""Pages/s of a link of 1 Gbit/s."""
GOAL = LINK * 0.25


def written(seconds: float, rate: float, hot: float) -> int:
    """Random writes to ``hot`` pages."""
    return round(hot * -math.expm1(-rate * seconds / hot))


def grown(rate: float, hot: float, upto: float = 8.0) -> Growth:
    growth = Growth()
    seconds = 0.05
    while seconds < upto:
        growth.note(seconds, written(seconds, rate, hot))
        seconds *= 1.5
    return growth


class Hand:
    """Holds nothing, and remembers."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.released = 0

    def hold(self, share: float) -> None:
        self.shares.append(share)

    def release(self) -> None:
        self.released += 1


def play(
    rate: float, hot: float, gain: float = 1.0, known: float = 1.0, rounds: int = 30
) -> tuple[Throttle, Hand, int]:
    """A migration of 260,000 pages; the throttle, the hand, and how many rounds it took, ``rounds`` for never.

    ``gain``: the guest writes so much more when held back than the model says.
    """
    hand = Hand()
    throttle = Throttle(lambda: (hand, "vCPU 0"), known)
    left, elapsed = 260_000.0, 0.0
    for number in range(rounds):
        took = left / LINK
        share = throttle.share if throttle.share == 1 else min(1.0, gain * throttle.share)
        seconds = 0.05
        while seconds < took:
            throttle.look(seconds, written(share * seconds, rate, hot))
            seconds *= 1.5
        left = written(share * took, rate, hot)
        throttle.look(took, round(left))
        elapsed += took
        if left <= GOAL:
            throttle.release(elapsed)
            return throttle, hand, number + 1
        throttle.steer(elapsed, round(left), LINK, GOAL)
    return throttle, hand, rounds


def test_growth_is_read_between_and_beyond_what_was_seen() -> None:
    growth = Growth()
    assert growth.within(1) == 0
    assert Growth().rate is None
    growth.note(1, 100)
    growth.note(2, 150)
    assert growth.within(0) == 0
    assert growth.within(0.5) == 50
    assert growth.within(1.5) == 125
    assert growth.within(4) == 250
    assert growth.rate == 100
    # The guest has changed: what is known of longer times is of another time.
    growth.note(1, 300)
    assert growth.within(2) == 600


def test_a_guest_that_converges_is_left_alone() -> None:
    growth = grown(rate=5_000, hot=65_536)
    assert choose(growth, 60_000, LINK, GOAL).share == 1
    throttle, hand, rounds = play(rate=5_000, hot=65_536)
    assert rounds < 5
    assert not hand.shares
    assert not throttle.steps


@pytest.mark.parametrize("rate", [40_000, 80_000])
def test_a_guest_that_never_converges_is_held_back_hard_and_briefly(rate: float) -> None:
    growth = grown(rate, hot=65_536)
    assert math.isinf(forecast(growth, 65_000, LINK, GOAL, 1.0).seconds)
    throttle, hand, rounds = play(rate, hot=65_536)
    assert rounds <= 5
    assert hand.shares
    assert min(hand.shares) <= 0.3
    assert hand.released == 1
    assert throttle.share == 1
    assert [step.share for step in throttle.steps][-1] == 1
    assert "never" in throttle.steps[0].why


def test_the_share_that_costs_least_is_the_one_a_search_finds() -> None:
    growth = grown(rate=60_000, hot=50_000)
    chosen = choose(growth, 50_000, LINK, GOAL)
    for share in SHARES:
        assert chosen.cost <= forecast(growth, 50_000, LINK, GOAL, share).cost


def test_where_nothing_helps_it_holds_as_hard_as_it_can_and_says_so() -> None:
    growth = grown(rate=10_000_000, hot=2_000_000)
    chosen = choose(growth, 2_000_000, 1_000.0, 10.0)
    assert chosen.share == min(SHARES)
    assert math.isinf(chosen.seconds)
    throttle = Throttle(lambda: (Hand(), "vCPU 0"), growth=growth)
    throttle.steer(1.0, 2_000_000, 1_000.0, 10.0)
    assert "not even so" in throttle.words


def test_a_guest_that_slows_down_less_than_it_should_is_held_harder() -> None:
    mild, hand, _ = play(rate=40_000, hot=65_536)
    stubborn, harder, rounds = play(rate=40_000, hot=65_536, gain=3.0)
    assert rounds < 12
    assert stubborn.gain > 1.3 > mild.gain
    # What was learnt is where the next migration begins.
    _, next_hand, next_rounds = play(rate=40_000, hot=65_536, gain=3.0, known=stubborn.gain)
    assert next_rounds <= rounds
    assert next_hand.shares[0] <= harder.shares[0]
    assert hand.shares[0] >= next_hand.shares[0]


def test_a_round_more_is_worth_it_while_it_shortens_the_pause() -> None:
    throttle = Throttle(lambda: (Hand(), "vCPU 0"), growth=grown(rate=4_000, hot=65_536))
    # 7,000 pages take a quarter of a second, in which a thousand are written.
    assert throttle.shortens(7_000, LINK)
    assert not throttle.shortens(200, LINK)
    assert not throttle.shortens(0, 0.0)
    assert not Throttle(lambda: (Hand(), "vCPU 0"), growth=grown(rate=20_000, hot=65_536)).shortens(7_000, LINK)


def test_a_guest_is_not_made_sluggish_for_little() -> None:
    growth = grown(rate=40_000, hot=65_536)
    chosen = choose(growth, 65_000, LINK, GOAL)
    assert chosen.share >= 0.07
    harder = forecast(growth, 65_000, LINK, GOAL, 0.02)
    assert chosen.cost < harder.cost


def test_it_lets_go_as_soon_as_nothing_calls_for_it() -> None:
    hand = Hand()
    throttle = Throttle(lambda: (hand, "vCPU 0"), growth=grown(40_000, 65_536))
    throttle.steer(1.0, 65_000, LINK, GOAL)
    assert throttle.share < 1
    for seconds in (0.05, 0.2, 1.0, 3.0):
        throttle.look(seconds, 20)
    throttle.steer(2.0, 9_000, LINK, GOAL)
    assert throttle.share == 1
    assert "by itself" in throttle.steps[-1].why
    assert hand.shares[-1] == 1


def test_writers_that_cannot_be_held_back_are_told_of_once() -> None:
    asked = []

    def refuse() -> tuple[Holding, str]:
        asked.append(1)
        raise KernelError("search for a mounted cpu controller", 2)

    throttle = Throttle(refuse, growth=grown(40_000, 65_536))
    for elapsed in (1.0, 2.0):
        throttle.steer(elapsed, 65_000, LINK, GOAL)
    assert asked == [1]
    assert len(throttle.steps) == 1
    assert "cannot be held back" in throttle.steps[0].why
    throttle.release(3.0)


def test_what_threads_usually_take() -> None:
    assert usual({1: 0.0, 2: 5.0, 3: 1.0}, {1: 2.0, 2: 5.0}, 4.0) == {1: 0.5, 2: 0.1}
