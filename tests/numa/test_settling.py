"""When to move, and when not: the clock is the test's."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.numa.settling import TRANSITIONS, Decision, Offer, Rules, Settler, State

RULES = Rules(gain=0.1, hold=10, rest=30, window=300, payback=60)


def offer(here: str = "a", key: str = "b", then: float = 50, price: float = 1) -> Offer:
    return Offer(here, key, 100, then, price)


def test_a_gain_must_last() -> None:
    settler = Settler(RULES)
    assert settler.consider(offer(), 0) == Decision(
        False, "another placement would save 50%; it must stay so for another 10 s"
    )
    assert settler.state is State.TEMPTED
    assert not settler.consider(offer(then=95), 9).move
    assert not settler.consider(offer(), 11).move
    assert not settler.consider(offer(), 20).move
    moved = settler.consider(offer(), 21)
    assert moved == Decision(True, "another placement has saved 50% of the time of accesses for 10 s")
    assert settler.consider(offer(), 50).words == "it was moved lately and rests for another 1 s"


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (offer(key="a"), "it is the best placement there is"),
        (offer(then=95), "save 5%"),
        (offer(then=120), "save 0%"),
        (offer(price=31), "does not make up for it within 60 s"),
        (Offer("a", "b", 0, 0, 1), "save 0%"),
    ],
)
def test_what_is_not_worth_it_is_said(one: Offer, words: str) -> None:
    settler = Settler(RULES)
    for now in range(100):
        decision = settler.consider(one, now)
        assert not decision.move
        assert words in decision.words
    assert settler.state is State.STEADY


def test_two_loads_that_take_turns_do_not_drag_a_guest_to_and_fro() -> None:
    settler, here, moves = Settler(RULES), "a", []
    for now in range(6000):
        there = "b" if here == "a" else "a"
        if settler.consider(offer(here, there), now).move:
            moves.append(now)
            here = there
    waits = [second - first for first, second in pairwise(moves)]
    # The other one is always better, and yet each return takes longer than the last.
    assert waits[0] >= RULES.window
    assert len(moves) <= 12
    assert "left lately" in settler.consider(offer(here, "b" if here == "a" else "a"), moves[-1] + 40).words


@given(
    st.lists(st.tuples(st.floats(0.1, 60), st.sampled_from("abcd"), st.floats(1, 120), st.floats(0, 50)), max_size=200)
)
def test_no_sequence_of_offers_breaks_the_rules(steps: list[tuple[float, str, float, float]]) -> None:
    settler, here, now, tempted = Settler(RULES), "a", 0.0, None
    moved = -1e9
    left: dict[str, float] = {}
    for pause, key, then, price in steps:
        now += pause
        before = settler.state
        one = offer(here, key, then, price)
        decision = settler.consider(one, now)
        assert settler.state is before or settler.state in TRANSITIONS[before] | {
            State.TEMPTED,
            State.STEADY,
            State.RESTING,
        }
        if decision.move:
            assert now - moved >= RULES.rest
            assert tempted is not None
            assert now - tempted >= RULES.hold
            assert now - left.get(key, -1e9) >= RULES.window
            assert then <= 90
            assert price <= (1 - then / 100) * RULES.payback
            moved, left[here], here, tempted = now, now, key, None
        elif settler.state is not State.TEMPTED:
            tempted = None
        elif before is not State.TEMPTED:
            tempted = now


def test_no_state_is_skipped() -> None:
    settler = Settler(RULES)
    with pytest.raises(RuntimeError, match="steady cannot become moving"):
        settler._become(State.MOVING, 0)
