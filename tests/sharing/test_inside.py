"""What breaking large pages would give, against a count by hand; and that none is broken without need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.pages import LARGE, PAGE_SIZE
from outboard.sharing.inside import Inside, Pressure, Thresholds, estimate, plenty, tlb_cost, to_break, wanted

ZERO = np.uint64(99)


def guest(digests: NDArray[np.uint64], large: NDArray[np.bool_] | None = None) -> Inside:
    everything = np.ones(digests.size, dtype=np.bool_)
    return Inside(digests, everything, everything if large is None else large)


def truth(guests: list[Inside]) -> int:
    """Sharing after everything was broken, less sharing before."""
    gained = 0
    all_contents: dict[int, list[int]] = {}
    for one in guests:
        for digest, stable, large in zip(one.digests.tolist(), one.stable, one.large, strict=True):
            if stable and digest and digest != ZERO:
                all_contents.setdefault(digest, [0, 0])[int(large)] += 1
            elif stable and digest == ZERO and large:
                gained += 1
    for outside, inside in all_contents.values():
        gained += max(outside + inside - 1, 0) - max(outside - 1, 0)
    return gained


@given(
    st.lists(
        st.lists(st.tuples(st.integers(96, 104), st.booleans(), st.booleans()), min_size=1, max_size=40),
        min_size=1,
        max_size=3,
    )
)
def test_without_sampling_it_is_the_truth(rows: list[list[tuple[int, bool, bool]]]) -> None:
    guests = [
        Inside(
            np.array([row[0] for row in one], dtype=np.uint64),
            np.array([row[1] for row in one], dtype=np.bool_),
            np.array([row[2] for row in one], dtype=np.bool_),
        )
        for one in rows
    ]
    found = estimate(guests, ZERO)
    assert found.pages == pytest.approx(truth(guests))
    assert found.error == 0
    assert sum(found.by_guest) == pytest.approx(found.pages)
    assert sum(float(blocks.sum()) for blocks in found.by_block) == pytest.approx(found.pages)


@pytest.mark.slow
@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_sample_is_within_its_error_and_five_per_cent(seed: int) -> None:
    random = np.random.default_rng(seed)
    # 400 MiB in three guests: half of it in common, a tenth zeros.
    common = random.integers(1 << 20, 1 << 63, 17_000, dtype=np.uint64)
    guests = []
    for _ in range(3):
        own = random.integers(1 << 20, 1 << 63, 13_600, dtype=np.uint64)
        guests.append(guest(np.concatenate((common, own, np.full(3_400, ZERO)))))
    exact = truth(guests)
    found = estimate(guests, ZERO, every=8)
    assert abs(found.pages - exact) / exact < 0.05
    # 1.96 standard errors hold 19 times in 20; twice that, always.
    assert abs(found.pages - exact) < 2 * found.error
    assert 0 < found.error / exact < 0.05


def test_what_is_in_the_pool_is_gained_whole() -> None:
    digests = np.array([5, 6, 6], dtype=np.uint64)
    assert estimate([guest(digests)], ZERO).pages == 1
    assert estimate([guest(digests)], ZERO, pooled=np.array([5, 6], dtype=np.uint64)).pages == 3


def chosen(guests: list[Inside], heat: list[NDArray[np.float64]], reclaim: int, least: int = 64) -> list[list[int]]:
    none = np.empty(0, dtype=np.uint64)
    return [blocks.tolist() for blocks in to_break(guests, ZERO, none, heat, reclaim, least)]


def block(*parts: tuple[int, int]) -> NDArray[np.uint64]:
    """A block of so many pages from a content on each, the rest of contents that are nowhere else."""
    made = np.concatenate([np.arange(first, first + count, dtype=np.uint64) for first, count in parts])
    block.own += LARGE  # type: ignore[attr-defined]
    rest = np.arange(block.own, block.own + LARGE - made.size, dtype=np.uint64)  # type: ignore[attr-defined]
    return np.concatenate((made, rest))


block.own = 1 << 40  # type: ignore[attr-defined]


def test_those_that_give_most_and_are_coldest_go_first_until_it_is_enough() -> None:
    one = guest(np.concatenate((block((1000, 100)), block((2000, 300)), block((3000, 400)))))
    other = guest(np.concatenate((block((1000, 100)), block((2000, 300)), block((3000, 400)))))
    cold = [np.zeros(3), np.zeros(3)]
    # Block 2 of both frees 400 pages; but not if it is touched nine times as often.
    hot = [np.array([0.0, 0.0, 9.0]), np.array([0.0, 0.0, 9.0])]
    assert chosen([one, other], cold, 0) == [[], []]
    assert chosen([one, other], cold, PAGE_SIZE) == [[2], [2]]
    assert chosen([one, other], hot, PAGE_SIZE) == [[1], [1]]
    assert chosen([one, other], cold, 400 * PAGE_SIZE) == [[2], [2]]
    assert chosen([one, other], cold, 401 * PAGE_SIZE) == [[1, 2], [1, 2]]
    assert chosen([one, other], cold, 1 << 40, least=1) == [[0, 1, 2], [0, 1, 2]]
    assert chosen([one, other], cold, 1 << 40, least=201) == [[], []]


def test_what_is_small_somewhere_is_gained_with_the_first_block() -> None:
    large = np.repeat([True, False], LARGE)
    one = guest(np.concatenate((block((1000, 300)), block((1000, 300)))), large)
    assert chosen([one], [np.zeros(2)], 300 * PAGE_SIZE) == [[0]]


def test_nothing_is_broken_without_pressure() -> None:
    thresholds = Thresholds(break_below=1 << 30, break_stalled=10.0, rebuild_above=4 << 30)
    assert wanted(Pressure(2 << 30), thresholds) == 0
    assert wanted(Pressure(1 << 30), thresholds) == 0
    assert wanted(Pressure((1 << 30) - 4096), thresholds) == 4096
    assert wanted(Pressure(8 << 30, stalled=10.0), thresholds) == 64 << 20
    assert wanted(Pressure(0, stalled=99.0), Thresholds()) == 0
    assert not plenty(Pressure(4 << 30), thresholds)
    assert plenty(Pressure(5 << 30), thresholds)
    assert not plenty(Pressure(5 << 30, stalled=10.0), thresholds)
    assert not plenty(Pressure(1 << 40), Thresholds())
    with pytest.raises(ValueError, match="more memory available"):
        Thresholds(break_below=2, rebuild_above=1)


def test_what_it_costs() -> None:
    cost = tlb_cost(10, 1000.0, 50.0)
    assert (cost.broken, cost.entries) == (10, 10 * (LARGE - 1))
    assert cost.seconds_per_second == pytest.approx(5e-5)
