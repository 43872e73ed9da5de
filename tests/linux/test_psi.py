"""Pressure on memory, as the kernel tells of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import psi
from tests.support.requirements import require


def test_what_the_kernel_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_text(
        "some avg10=1.00 avg60=0.50 avg300=0.00 total=123456\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=789\n"
    )
    assert psi.stalled_us(path) == (123456, 789)
    assert psi.why_not(path) is None
    path.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n")
    assert psi.stalled_us(path) == (7, 0)


def test_where_there_is_none_it_is_said_why(tmp_path: Path) -> None:
    assert psi.why_not(tmp_path / "memory") == "the kernel was built without CONFIG_PSI"
    with pytest.raises(KernelError, match="read of"):
        psi.stalled_us(tmp_path / "memory")
    with pytest.raises(KernelError, match="trigger of"):
        psi.Trigger(1000, 1_000_000, tmp_path / "memory")


def test_a_trigger_waits() -> None:
    require("psi", "root")
    assert psi.stalled_us()[0] >= 0
    with psi.Trigger(1_900_000, 2_000_000) as trigger:
        assert not trigger.wait(0.01)
        trigger.close()
    with pytest.raises(KernelError, match="trigger of 1 us in 1 us"):
        psi.Trigger(1, 1)


def test_the_share_of_the_last_ten_seconds(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_text("some avg10=12.50 avg60=0.50 avg300=0.00 total=1\nfull avg10=7.00 avg60=0.00 avg300=0.00 total=7\n")
    assert psi.stalled_share(path) == 12.5
    with pytest.raises(KernelError, match="read of"):
        psi.stalled_share(tmp_path / "none")
