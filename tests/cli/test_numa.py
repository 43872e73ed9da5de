"""numa topology, of this host and of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from outboard.cli import outboard
from outboard.errors import SpecError, UsageError
from outboard.numa.policies import POLICIES

TWO = Path(__file__).parents[1] / "numa" / "topologies" / "cxl.json"


def run(*arguments: str) -> str:
    done = CliRunner().invoke(outboard, ["numa", *arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def test_what_is_measured_is_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOARD_STATE_DIR", str(tmp_path))
    assert json.loads(run("topology", "-o", "json"))["latencies"] is None
    assert "guessed" in run("topology")
    measured = json.loads(run("topology", "--measure", "--size", "4", "-o", "json"))
    assert measured["schema"] == "outboard.numa-topology.v1"
    assert measured["latencies"]["idle"]
    assert json.loads(run("topology", "-o", "json")) == measured
    assert "guessed" not in run("topology")


def test_a_file_is_shown() -> None:
    shown = run("topology", "--from", str(TWO))
    assert "3 nodes, 12 cores with 2 threads each, 2 last-level caches (L3 20.0 MiB)" in shown
    assert "256.0 GiB" in shown


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        run("topology", "--from", str(TWO), "--measure")
    with pytest.raises(UsageError, match="give both"):
        run("topology", "--size", "4")
    with pytest.raises(SpecError, match="cannot read the topology"):
        run("topology", "--from", str(tmp_path / "none"))


def test_policies_say_when_to_use_them() -> None:
    told = [json.loads(line) for line in run("policies", "-o", "json").splitlines()]
    assert [one["name"] for one in told] == list(POLICIES)
    assert all(one["use"].endswith(".") for one in told)
    assert "hottest-first" in run("policies")
