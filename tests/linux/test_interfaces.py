"""The interface that leads somewhere, and its speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import interfaces


def test_the_loopback_leads_to_ourselves_and_has_no_speed() -> None:
    assert interfaces.towards("127.0.0.1") == "lo"
    assert interfaces.speed("lo") is None


def test_what_is_no_address_leads_nowhere() -> None:
    assert interfaces.towards("256.1.1.1") is None
    assert interfaces.towards("::1") is None


def test_a_speed_is_in_bits_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_NET", tmp_path)
    for name, says, means in (("eth0", "1000\n", 1_000_000_000), ("eth1", "-1\n", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(says)
        assert interfaces.speed(name) == means
    with pytest.raises(KernelError, match="speed of eth2"):
        interfaces.speed("eth2")
