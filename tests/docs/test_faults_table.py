"""What the documentation says of faults is what the tests expect."""

import pytest

from docs import faults_table
from outboard.migrate.states import FINAL, SAFE_AT, State, Where
from tests.support.matrix import CELLS, IN_TESTS, Fault, Moment, Place


def test_the_table_in_the_page_is_up_to_date() -> None:
    assert faults_table.drawn(faults_table.PAGE.read_text()) == faults_table.draw(), "run python -m docs.faults_table"


def test_a_page_that_differs_is_noticed() -> None:
    page = faults_table.PAGE.read_text()
    assert faults_table.drawn(page.replace("6, ended", "0, ended")) != faults_table.draw()
    with pytest.raises(ValueError, match="not found"):
        faults_table.drawn(page.replace(faults_table.BEGIN, ""))


def test_every_state_in_which_a_fault_can_hit_is_there() -> None:
    assert {moment.state for moment in Moment} == set(State) - FINAL - {State.NEW}
    assert set(CELLS) == {(moment, fault) for moment in Moment for fault in Fault}
    assert all(len(set(faults)) == len(faults) for faults in IN_TESTS.values())
    assert set(IN_TESTS) == set(Moment)


def test_no_cell_promises_what_the_states_do_not() -> None:
    where = {Place.SOURCE: Where.SOURCE, Place.TARGET: Where.DESTINATION, Place.STOPPED: Where.BOTH}
    for (moment, fault), outcome in CELLS.items():
        if outcome.state is not None and outcome.place is not Place.GONE:
            assert SAFE_AT[outcome.state] is where[outcome.place], (moment, fault)
        if outcome.place is Place.GONE:
            assert fault is Fault.SOURCE_VMM
            assert SAFE_AT[moment.state] is Where.SOURCE
        if outcome.place is Place.STOPPED:
            assert fault is Fault.TARGET_VMM
            assert SAFE_AT[moment.state] is Where.BOTH
