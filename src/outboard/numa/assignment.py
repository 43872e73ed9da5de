"""Who gets which place at the least cost: a row of costs for each who, a column for each of at least as many places.

``exact`` grows the assignment by one row at a time along the cheapest augmenting path (Jonker and Volgenant, Computing
38, 1987): rows^2 x columns steps at most. Its prices prove the optimum to whoever asks: no cost is below the sum of
its row's and its column's, each chosen one is that sum, and only a taken column's is below zero.

``auction`` lets rows outbid one another by at least ``step`` (Bertsekas, Annals of Operations Research 14, 1988): it
ends within rows x step of the optimum, since prices begin at zero and a place that was bid for stays taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

_COSTS, _F8, _I8 = types.float64[:, ::1], types.float64[::1], types.int64[::1]


class Assignment(NamedTuple):
    """The column of each row, and the prices that prove it."""

    columns: NDArray[np.int64]
    row_prices: NDArray[np.float64]
    column_prices: NDArray[np.float64]


@njit(types.void(_COSTS, _I8, _F8, _F8), cache=True, nogil=True)
def _exact(
    costs: NDArray[np.float64], owner: NDArray[np.int64], u: NDArray[np.float64], v: NDArray[np.float64]
) -> None:
    rows, columns = costs.shape
    # Rows and columns are counted from 1 here; 0 is the row that is being placed and a column of its own.
    way = np.zeros(columns + 1, dtype=np.int64)
    least = np.empty(columns + 1, dtype=np.float64)
    used = np.empty(columns + 1, dtype=np.bool_)
    for row in range(1, rows + 1):
        owner[0] = row
        at = 0
        least[:] = np.inf
        used[:] = False
        while True:
            used[at] = True
            mine = owner[at]
            best, following = np.inf, 0
            for column in range(1, columns + 1):
                if used[column]:
                    continue
                reduced = costs[mine - 1, column - 1] - u[mine] - v[column]
                if reduced < least[column]:
                    least[column] = reduced
                    way[column] = at
                if least[column] < best:
                    best, following = least[column], column
            for column in range(columns + 1):
                if used[column]:
                    u[owner[column]] += best
                    v[column] -= best
                else:
                    least[column] -= best
            at = following
            if owner[at] == 0:
                break
        while at != 0:
            before = way[at]
            owner[at] = owner[before]
            at = before


def exact(costs: NDArray[np.float64]) -> Assignment:
    """The assignment of least cost.

    :raise ValueError: fewer columns than rows, or a cost that is no number.
    """
    rows, columns = costs.shape
    _check(costs)
    owner = np.zeros(columns + 1, dtype=np.int64)
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    _exact(np.ascontiguousarray(costs, dtype=np.float64), owner, u, v)
    found = np.empty(rows, dtype=np.int64)
    taken = np.flatnonzero(owner[1:])
    found[owner[1:][taken] - 1] = taken
    return Assignment(found, u[1:], v[1:])


@njit(types.void(_COSTS, types.float64, _I8, _I8, _F8), cache=True, nogil=True)
def _auction(
    costs: NDArray[np.float64],
    step: float,
    found: NDArray[np.int64],
    owner: NDArray[np.int64],
    prices: NDArray[np.float64],
) -> None:
    rows, columns = costs.shape
    waiting = np.arange(rows)
    left = rows
    while left > 0:
        left -= 1
        row = waiting[left]
        best, second, chosen = np.inf, np.inf, 0
        for column in range(columns):
            cost = costs[row, column] + prices[column]
            if cost < best:
                best, second, chosen = cost, best, column
            elif cost < second:
                second = cost
        # With a single place there is nobody else to outbid.
        prices[chosen] += step if columns == 1 else second - best + step
        if owner[chosen] >= 0:
            waiting[left] = owner[chosen]
            left += 1
        owner[chosen] = row
        found[row] = chosen


def auction(costs: NDArray[np.float64], step: float) -> Assignment:
    """An assignment whose cost is within rows x ``step`` of the least.

    :raise ValueError: fewer columns than rows, a cost that is no number, or a step that is not above zero.
    """
    rows, columns = costs.shape
    _check(costs)
    if not step > 0:
        raise ValueError(f"a step of {step} would let rows outbid one another for ever")
    found, owner, prices = np.zeros(rows, np.int64), np.full(columns, -1, np.int64), np.zeros(columns)
    costs = np.ascontiguousarray(costs, dtype=np.float64)
    _auction(costs, step, found, owner, prices)
    return Assignment(found, costs[np.arange(rows), found] + prices[found], -prices)


def _check(costs: NDArray[np.float64]) -> None:
    rows, columns = costs.shape
    if columns < rows:
        raise ValueError(f"{rows} cannot each have one of {columns} places")
    if not np.isfinite(costs).all():
        raise ValueError("a cost is no finite number")
