"""mrc, wss and heat on a process whose accesses are known, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from outboard.cli import outboard
from outboard.errors import NotFoundError, RefusedError, UsageError
from tests.support.target import Target

pytestmark = pytest.mark.slow


@pytest.fixture
def busy() -> Iterator[Target]:
    """A target one of whose threads writes to random pages of 4 MiB."""
    with Target(mebibytes=4, threads=1) as target:
        target.ask("g")
        yield target
        assert target.ask("s").startswith("bad 0 of")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(outboard, [*arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def test_a_curve_ends_where_the_memory_does(busy: Target, tmp_path: Path) -> None:
    svg, html = tmp_path / "c.svg", tmp_path / "c.html"
    output = run(
        *("mrc", "--pid", str(busy.pid), "--duration", "2", "--access-rate", "1e9", "-o", "json"),
        *("--svg", str(svg), "--html", str(html)),
    )
    found = json.loads(output)
    assert found["schema"] == "outboard.mrc.v1"
    assert found["backend"] in ("page-tables", "messages")
    # How much of it the writer gets to in the time is up to the machine.
    assert 2 << 20 < found["horizon"] < 1.2 * (4 << 20)
    points = found["points"]
    assert points[0]["misses_per_s"] > 10 * points[-1]["misses_per_s"]
    assert points[0]["ratio"] == pytest.approx(points[0]["misses_per_s"] / 1e9)
    assert all(point["low"] <= point["high"] for point in points)
    ElementTree.fromstring(svg.read_text())
    assert "<svg" in html.read_text()


def test_each_interval_has_a_curve(busy: Target) -> None:
    lines = run("mrc", "--pid", str(busy.pid), "--duration", "2", "--interval", "1", "-o", "ndjson").splitlines()
    assert len(lines) >= 2
    for line in lines[:2]:
        found = json.loads(line)
        assert found["seconds"] >= 0.9
        assert found["points"][0]["ratio"] is None


def test_the_table_has_a_picture(busy: Target) -> None:
    output = run("mrc", "--pid", str(busy.pid), "--duration", "1")
    assert "misses/s against memory" in output
    assert "MB" in output


def test_the_working_set_is_the_memory(busy: Target) -> None:
    found = json.loads(run("wss", "--pid", str(busy.pid), "--duration", "2", "-o", "json"))
    assert found["schema"] == "outboard.wss.v1"
    assert found["memory"] == 4 << 20
    longest = found["working_sets"][-1]
    assert longest["window"] == 1.0
    # How much of it the writer gets to within a second is up to the machine.
    assert 2 << 20 < longest["bytes"] < 1.2 * (4 << 20)
    assert "touched within" in run("wss", "--pid", str(busy.pid), "--duration", "1")


def test_heat_is_where_memory_is_touched(tmp_path: Path) -> None:
    svg = tmp_path / "h.svg"
    with Target(mebibytes=4, threads=1) as target:
        quiet = run("heat", "--pid", str(target.pid), "--duration", "0.4", "--interval", "0.2", "-o", "ndjson")
        assert json.loads(quiet.splitlines()[-1])["touched"] == 0
        target.ask("g")
        lines = run(
            *("heat", "--pid", str(target.pid), "--duration", "0.4", "--interval", "0.2", "-o", "ndjson"),
            *("--svg", str(svg)),
        ).splitlines()
        assert "│" in run("heat", "--pid", str(target.pid), "--duration", "0.2", "--interval", "0.2")
        target.ask("s")
    found = json.loads(lines[-1])
    assert found["schema"] == "outboard.heat.v1"
    assert max(json.loads(line)["touched"] for line in lines) > 0.5
    assert len(found["cells"]) == 64
    ElementTree.fromstring(svg.read_text())


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(UsageError):
        run("mrc")
    with pytest.raises(NotFoundError):
        run("wss", "--pid", "4194303")
    with Target("anon") as target, pytest.raises(RefusedError) as caught:
        run("heat", "--pid", str(target.pid))
    assert caught.value.reason == "no-shared-memory"


@pytest.mark.parametrize("command", ["mrc", "heat"])
@pytest.mark.parametrize("option", ["--svg", "--html"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    command: str, option: str, tmp_path: Path
) -> None:
    for place in (tmp_path / "none" / "x", tmp_path):
        done = CliRunner().invoke(outboard, [command, "--pid", "1", option, str(place)])
        assert done.exit_code == 2
        assert "cannot be written" in done.output
