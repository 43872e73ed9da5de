"""numa topology, of this host and of files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import click
import numpy as np
import pytest
from click.testing import CliRunner

from outboard.cli import outboard
from outboard.cli.numa_guests import parts
from outboard.errors import NotFoundError, SpecError, UsageError
from outboard.linux import proc
from outboard.numa.policies import POLICIES, UNKNOWN, Memory
from outboard.vmm.guest import Guest, Region
from tests.support.requirements import require
from tests.support.target import Target

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


def test_each_of_a_vms_own_nodes_goes_to_one_of_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    mapping = proc.maps(os.getpid())[0]
    # The memory of the first node lies below and above the hole for devices.
    spans = [("m0", 0, 1000), ("m0", 1000, 24), ("m1", 1024, 1024)]
    regions = tuple(Region(first, pages, 0, 0, 0, 4096, name, mapping) for name, first, pages in spans)
    guest = cast(Guest, SimpleNamespace(name="web", pages=2048, regions=regions))
    heat = np.arange(2048.0)
    memory = Memory(heat, heat, np.full(2048, UNKNOWN, dtype=np.int16))
    (zero, first), (one, second) = parts(guest, memory, 1, (0, 1))
    assert (zero, one) == (0, 1)
    assert np.flatnonzero(first.node == UNKNOWN).tolist() == list(range(1024))
    assert np.flatnonzero(second.node == UNKNOWN).tolist() == list(range(1024, 2048))
    assert not first.heat[1024:].any()
    assert (second.heat[1024:] == heat[1024:]).all()
    assert not capsys.readouterr().err
    assert parts(guest, memory, 1, (1,)) == [(1, memory)]
    assert "memory of 2 backends (m0, m1): all of it goes to node 1" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--to names 3 nodes, .* of 2 backends \(m0, m1\)"):
        parts(guest, memory, 1, (0, 1, 2))
    large = Memory(heat[:4], heat[:4], np.full(4, UNKNOWN, dtype=np.int16))
    assert [np.flatnonzero(part.node == UNKNOWN).tolist() for _, part in parts(guest, large, 512, (1, 0))] == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.slow
def test_a_process_is_shown_placed_and_moved_within_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("root", "no-swap")
    monkeypatch.setenv("OUTBOARD_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("OUTBOARD_STATE_DIR", str(tmp_path))
    with Target(mebibytes=8) as target:
        target.ask("g")
        pid = ("--pid", str(target.pid))
        # Long enough for a busy machine to let it touch something.
        shown = json.loads(run("show", *pid, "--watch", "1.5", "-o", "json"))
        assert shown["schema"] == "outboard.numa-guest.v1"
        assert sum(one["memory"] for one in shown["nodes"]) == 8 << 20
        assert 0 < sum(one["touched"] for one in shown["nodes"]) <= 8 << 20
        assert "OF THE ACCESSES" in run("show", *pid, "--watch", "0.3")
        node = shown["nodes"][0]["node"]
        if len(shown["nodes"]) == 1:
            told = json.loads(run("move", *pid, "--to", str(node), "--watch", "0.3", "-o", "ndjson").splitlines()[-1])
            assert (told["node"], told["moved"], told["local"], told["to_come"]) == (node, 0, 1.0, 0)
            assert "0 B not on node" in run("move", *pid, "--to", str(node), "--watch", "0.3", "--dry-run")
        with pytest.raises(NotFoundError, match="no node 900"):
            run("move", *pid, "--to", "900")
        with pytest.raises(UsageError, match="--to names 2 nodes, and the memory of target is of 1 backends"):
            run("move", *pid, "--to", f"{node},{node}", "--watch", "0", "--policy", "address")
        with pytest.raises(click.BadParameter, match="names no nodes"):
            run("move", *pid, "--to", "0;1")
        with pytest.raises(UsageError, match="needs to know what is hot"):
            run("move", *pid, "--to", str(node), "--watch", "0")
        before = os.sched_getaffinity(target.pid)
        told = json.loads(run("place", *pid, "--watch", "0.3", "--dry-run", "-o", "json"))
        assert not told["done"]
        assert len(told["reasons"]) == len(told["threads"]) == 4
        assert os.sched_getaffinity(target.pid) == before
        with pytest.raises(UsageError, match="give one of them"):
            run("place", *pid, "--release", "--dry-run")
        with pytest.raises(NotFoundError, match="were not placed"):
            run("place", *pid, "--release")
        lines = run(
            "balance",
            *pid,
            "--watch",
            "--rounds",
            "2",
            "--interval",
            "0.5",
            "--look",
            "0.2",
            "--dry-run",
            "-o",
            "ndjson",
        )
        told_of = [json.loads(line) for line in lines.splitlines()]
        assert [(one["vm"], one["moved"]) for one in told_of] == [("target", False)] * 2
        assert target.ask("s").startswith("bad 0 of ")
    with pytest.raises(NotFoundError, match="no VM runs on this host"):
        run("balance")
