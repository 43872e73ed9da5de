"""What `outboard migrate` asks the agent for."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from outboard.cli import api
from outboard.cli.migrate import migrate


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    """The requests that the commands make; each is answered as begun."""
    requests: list[tuple[str, str, Any]] = []

    def call(method: str, path: str, body: Any = None) -> Any:
        requests.append((method, path, body))
        return {"migration": "0123"}

    monkeypatch.setattr(api, "call", call)
    return requests


@pytest.mark.parametrize(
    ("arguments", "goal", "options"),
    [
        ([], None, {}),
        (["--pre-copy"], None, {"method": "pre-copy"}),
        (["--enlightened", "--goal", "guest-speed"], "guest-speed", {"method": "enlightened"}),
        (["--hybrid", "--max-downtime", "300ms", "--no-hints"], None, None),
        (["--goal", "time", "--max-bandwidth", "1Gbit"], "time", {"max_bandwidth": 125_000_000}),
    ],
)
def test_only_what_was_said_is_passed_on(
    asked: list[tuple[str, str, Any]], arguments: list[str], goal: str | None, options: dict[str, Any] | None
) -> None:
    done = CliRunner().invoke(migrate, ["web", "b", "--detach", *arguments])
    assert done.exit_code == 0, done.output
    if options is None:
        options = {"method": "hybrid", "max_downtime": 0.3, "hints": False}
    assert asked == [("POST", "/v1/migrations", {"vm": "web", "host": "b", "goal": goal, "options": options})]


def test_an_unknown_goal_is_a_wrong_use(asked: list[tuple[str, str, Any]]) -> None:
    done = CliRunner().invoke(migrate, ["web", "b", "--goal", "glory"])
    assert done.exit_code == 2
    assert not asked
