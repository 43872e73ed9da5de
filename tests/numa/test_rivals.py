"""Who else moves memory here, and pausing the kernel."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from outboard.numa import rivals


def test_numad_is_found_by_its_name(tmp_path: Path) -> None:
    for pid, name in ((7, "bash"), (12, "numad"), (13, "numadx")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(name + "\n")
    assert rivals.numad(tmp_path) == 12
    (tmp_path / "12" / "comm").unlink()
    assert rivals.numad(tmp_path) == 0


def test_balancing_is_paused_and_resumed(tmp_path: Path) -> None:
    switch = tmp_path / "numa_balancing"
    assert not rivals.balancing(switch)
    with rivals.balancing_paused(switch):
        assert not switch.exists(), "a kernel without it has nothing to pause"
    switch.write_text("2\n")
    assert rivals.balancing(switch)
    with contextlib.suppress(KeyError), rivals.balancing_paused(switch):
        assert not rivals.balancing(switch)
        raise KeyError
    assert switch.read_text() == "2"
    switch.write_text("0\n")
    with rivals.balancing_paused(switch):
        assert not rivals.balancing(switch)
    assert switch.read_text() == "0\n"


def test_they_are_told_of_where_there_are_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "several_nodes", lambda: False)
    assert rivals.warnings() == []
    monkeypatch.setattr(rivals, "several_nodes", lambda: True)
    monkeypatch.setattr(rivals, "balancing", lambda: True)
    monkeypatch.setattr(rivals, "numad", lambda: 4711)
    kernel, other = rivals.warnings()
    assert "--pause-balancing" in kernel
    assert "process 4711" in other
    assert rivals.warnings(paused=True) == [other]
