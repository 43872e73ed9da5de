"""The migration's table: every transition, every refusal, and what must hold of any path through it."""

import itertools

import pytest

from outboard.migrate.states import FINAL, SAFE_AT, TRANSITIONS, Event, IllegalTransitionError, Machine, State, Where


def in_state(state: State) -> Machine:
    machine = Machine()
    machine.state = state
    return machine


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_moves_or_refuses(state: State, event: Event) -> None:
    machine = in_state(state)
    assert machine.accepts(event) == ((state, event) in TRANSITIONS)
    if machine.accepts(event):
        assert machine.on(event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=state.value):
            machine.on(event)
        assert machine.state is state


def test_every_state_knows_where_the_vm_is_and_is_reachable() -> None:
    assert set(SAFE_AT) == set(State)
    assert set(TRANSITIONS.values()) | {State.NEW} == set(State)


def test_final_states_are_those_without_a_way_out() -> None:
    assert {state for state in State if not any(source is state for source, _ in TRANSITIONS)} == FINAL


@pytest.mark.parametrize("state", [state for state in State if state not in FINAL])
def test_any_state_can_fail_and_failing_never_moves_the_vm_back(state: State) -> None:
    after = TRANSITIONS[state, Event.FAIL]
    assert (SAFE_AT[state] is Where.SOURCE) == (SAFE_AT[after] is Where.SOURCE)


def test_only_commit_takes_the_vm_from_the_source() -> None:
    leaving = {
        event
        for (state, event), target in TRANSITIONS.items()
        if SAFE_AT[state] is Where.SOURCE and SAFE_AT[target] is not Where.SOURCE
    }
    assert leaving == {Event.COMMIT}


def test_no_cancel_after_the_commit() -> None:
    for (state, event), target in TRANSITIONS.items():
        if event is Event.CANCEL:
            assert SAFE_AT[state] is Where.SOURCE
            assert SAFE_AT[target] is Where.SOURCE
