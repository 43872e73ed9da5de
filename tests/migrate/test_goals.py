"""A goal sets what nobody has said; what was said stands."""

from __future__ import annotations

import pytest

from outboard.errors import UsageError
from outboard.migrate.goals import SETTINGS, WHY, options_for
from outboard.migrate.method import Goal, Method, Options


def test_without_a_goal_the_defaults_and_what_was_said() -> None:
    assert options_for(None, {}) == Options()
    assert options_for(None, {"method": "pre-copy", "max_downtime": 0.05}) == Options(
        method=Method.PRE_COPY, max_downtime=0.05
    )


@pytest.mark.parametrize("goal", Goal)
def test_each_goal_is_in_the_table_and_in_the_options(goal: Goal) -> None:
    options = options_for(goal, {})
    assert options.goal is goal
    assert WHY[goal]
    for name, value in SETTINGS[goal].items():
        assert getattr(options, name) == value


def test_what_was_said_overrides_the_goal_and_nothing_else() -> None:
    options = options_for(Goal.GUEST_SPEED, {"method": "pre-copy", "max_bandwidth": 1000})
    assert (options.method, options.max_bandwidth) == (Method.PRE_COPY, 1000)
    assert not options.throttle
    assert options.goal is Goal.GUEST_SPEED


@pytest.mark.parametrize("said", [{"metod": "pre-copy"}, {"max_downtime": "long"}, {"method": "teleport"}])
def test_what_cannot_be_meant_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="options of a migration"):
        options_for(Goal.TIME, said)
