"""What `outboard migrate` asks the agent for, and how a plan is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from outboard.cli import api
from outboard.cli.migrate import migrate
from outboard.errors import RefusedError
from outboard.migrate.method import Method, Options
from outboard.migrate.plan import Blocker, Expected, Link, Plan, Range, Watched


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


PLAN = Plan(
    vm="web",
    source="a",
    destination="b",
    options=Options(),
    blockers=[],
    watched=Watched(
        pages=65536,
        populated=40000,
        data=Range(32000, 32000),
        zero=Range(7000, 8000),
        free_data=Range(4000, 4500),
        early=3000,
        compressed=0.5,
        growth=[(0.05, 250), (3.0, 9000)],
        seconds=3.0,
        trace="pagemap",
        hints="guest agent: 65536 pages classed",
        hints_s=0.2,
    ),
    link=Link(Range(50e6, 120e6), "a burst"),
    expected=[
        Expected(
            method=Method.PRE_COPY,
            ends=False,
            total_s=Range(1.5, None),
            resume_s=Range(1.5, None),
            blackout_ms=Range(5, 300),
            bytes=Range(130e6, None),
            share=1.0,
            verdict="does not end: the guest writes faster than the link carries",
        )
    ],
    recommended=Method.ENLIGHTENED,
    why="its time is the shortest",
)


def planned(monkeypatch: pytest.MonkeyPatch, plan: Plan, *arguments: str) -> Result:
    def call(method: str, path: str, body: Any = None) -> Any:
        assert (method, path, body["vm"]) == ("POST", "/v1/plans", "web")
        return msgspec.json.decode(msgspec.json.encode(plan))

    monkeypatch.setattr(api, "call", call)
    return CliRunner().invoke(migrate, ["web", "b", "--plan", *arguments])


def test_a_plan_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    done = planned(monkeypatch, PLAN)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "web from a to b: nothing was moved"
    assert "268 MB: 131 MB data, of that 16.4 MB to 18.4 MB free, 28.7 MB to 32.8 MB zeros; zlib makes 50%" in lines[1]
    assert "20.5 MB/s at first, to 36.9 MB within 3.0 s" in done.output
    assert "1.5 s or more" in done.output
    assert "pre-copy    does not end: the guest writes faster than the link carries" in lines
    assert lines[-1].endswith("enlightened: its time is the shortest")


def test_what_stands_in_the_way_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = msgspec.structs.replace(PLAN, blockers=[Blocker("b", "no-qemu", "there is no program qemu")])
    done = planned(monkeypatch, blocked)
    assert isinstance(done.exception, RefusedError)
    assert done.exception.reason == "no-qemu"
    assert "blocked   at b (no-qemu): there is no program qemu" in done.output
    told = planned(monkeypatch, blocked, "-o", "json")
    assert msgspec.json.decode(told.output, type=Plan) == blocked
