"""What chaos takes for right, and what for wrong."""

from __future__ import annotations

import pytest

from bench.chaos_migrate import Account, judge
from outboard.migrate.states import State
from tests.support.matrix import CANCELLED, CELLS, DONE, FAILED, LOST, UNTOLD, Fault, Outcome, Place

_NOBODY_KILLED = [Fault.CUT, Fault.SOURCE_ENGINE, Fault.TARGET_AGENT]


@pytest.mark.parametrize("outcome", [DONE, FAILED, CANCELLED, UNTOLD])
def test_one_copy_where_the_command_says(outcome: Outcome) -> None:
    assert judge(outcome, _NOBODY_KILLED) is None


def test_every_cell_of_the_table_is_right() -> None:
    assert [(cell, outcome) for cell, outcome in CELLS.items() if judge(outcome, [cell[1]]) is not None] == []


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome(0, State.COMPLETED, Place.SOURCE), "the command said completed"),
        (Outcome(1, State.FAILED, Place.TARGET), "the command said failed"),
        (Outcome(5, State.CANCELLED, Place.TARGET), "the command said cancelled"),
        (Outcome(1, None, Place.GONE), "nobody killed it"),
        (Outcome(8, None, Place.STOPPED), "stands still"),
        (LOST, "stands still"),
    ],
)
def test_what_is_wrong_is_told(outcome: Outcome, words: str) -> None:
    assert words in str(judge(outcome, _NOBODY_KILLED))


def test_a_guest_that_is_safe_never_stands_still() -> None:
    assert "stands still" in str(judge(Outcome(1, State.FAILED, Place.STOPPED), [Fault.TARGET_VMM]))


def test_what_is_wrong_is_kept_and_counted() -> None:
    account = Account()
    account.note("copying", "cut", FAILED, 0.5, None)
    account.note("copying", "cut", None, None, "it hangs")
    assert account.wrong() == ["copying, cut: it hangs"]
    (cell,) = account.cells.values()
    assert (cell.rounds, cell.repaired) == (2, [0.5])
    assert account.table().row_count == 1
