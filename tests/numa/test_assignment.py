"""Assignments: the least cost, against every permutation and by their own proof."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.numa.assignment import Assignment, auction, exact


def costs_of(seed: int, rows: int, columns: int, *, coarse: bool) -> NDArray[np.float64]:
    random = np.random.default_rng(seed)
    # Coarse costs have many ties, and some below zero.
    return random.integers(-2, 3, (rows, columns)).astype(float) if coarse else random.uniform(0, 100, (rows, columns))


def total(costs: NDArray[np.float64], found: Assignment) -> float:
    assert len(set(found.columns.tolist())) == len(costs)
    return float(costs[np.arange(len(costs)), found.columns].sum())


def proven(costs: NDArray[np.float64], found: Assignment) -> bool:
    """Whether the prices prove the assignment: then no other can cost less, by weak duality."""
    slack = costs - found.row_prices[:, None] - found.column_prices[None, :]
    free = np.ones(costs.shape[1], dtype=np.bool_)
    free[found.columns] = False
    return bool(
        (slack > -1e-9).all()
        and (np.abs(slack[np.arange(len(costs)), found.columns]) < 1e-9).all()
        and (found.column_prices <= 1e-12).all()
        and (found.column_prices[free] == 0).all()
    )


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 2), st.booleans())
@settings(max_examples=60)
def test_no_permutation_costs_less(seed: int, rows: int, more: int, coarse: bool) -> None:
    costs = costs_of(seed, rows, rows + more, coarse=coarse)
    least = min(
        sum(costs[row, column] for row, column in enumerate(one)) for one in permutations(range(rows + more), rows)
    )
    found = exact(costs)
    assert total(costs, found) == pytest.approx(least)
    assert proven(costs, found)


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 40), st.booleans())
@settings(max_examples=40)
def test_larger_ones_prove_themselves_and_an_auction_is_within_its_bound(
    seed: int, rows: int, more: int, coarse: bool
) -> None:
    costs = costs_of(seed, rows, rows + more, coarse=coarse)
    best, found = exact(costs), auction(costs, 0.25)
    assert proven(costs, best)
    assert total(costs, best) <= total(costs, found) + 1e-9 <= total(costs, best) + rows * 0.25 + 2e-9


def test_a_proof_of_something_else_is_noticed() -> None:
    costs = costs_of(7, 6, 8, coarse=False)
    found = exact(costs)
    swapped = found.columns.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert not proven(costs, found._replace(columns=swapped))


def test_what_cannot_be_assigned_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cannot each have one of 2"):
        exact(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no finite number"):
        auction(np.array([[np.nan]]), 1)
    with pytest.raises(ValueError, match="for ever"):
        auction(np.zeros((1, 1)), 0)
