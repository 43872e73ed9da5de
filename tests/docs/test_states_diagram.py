"""The diagram in the documentation is the table in the code."""

import xml.etree.ElementTree as ET

import pytest

from docs import states_diagram
from outboard.migrate.states import TRANSITIONS, Event, State

SVG = {"svg": "http://www.w3.org/2000/svg"}


def test_committed_diagram_is_up_to_date() -> None:
    assert states_diagram.OUTPUT.read_text() == states_diagram.draw(), "run python -m docs.states_diagram"


def test_every_state_and_transition_is_drawn() -> None:
    picture = ET.fromstring(states_diagram.draw())
    words = [text.text for text in picture.iterfind("svg:text", SVG)]
    assert {state.value for state in State} <= set(words)
    assert len(picture.findall("svg:line", SVG)) == len(TRANSITIONS)
    assert [words.count(event.value) for event in Event] == [
        sum(event is other for _, other in TRANSITIONS) for event in Event
    ]


def test_a_table_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSITIONS, (State.PAUSED, Event.READY), State.POSTCOPY)
    with pytest.raises(ValueError, match="drawn"):
        states_diagram.draw()
