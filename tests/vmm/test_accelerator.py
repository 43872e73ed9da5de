"""The trial guest, under TCG, which is everywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from outboard.vmm import accelerator
from tests.support.requirements import require

QEMU = "qemu-system-x86_64"


def test_the_trial_guest_counts_and_says_so() -> None:
    require("qemu")
    assert accelerator._try(QEMU, "tcg") is None


def test_a_qemu_that_fails_is_quoted() -> None:
    require("qemu")
    assert "nonsense" in (accelerator._try(QEMU, "nonsense") or "")
    assert accelerator._try("/nowhere/qemu", "tcg") == "/nowhere/qemu could not be run: No such file or directory"


def test_a_guest_that_crawls_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu")
    monkeypatch.setattr(accelerator, "_COUNT", 0xFFFFFFFF)
    monkeypatch.setattr(accelerator, "_LIMIT_S", 0.5)
    assert "instructions are emulated" in (accelerator._try(QEMU, "tcg") or "")


def test_the_answer_is_remembered_for_this_boot_and_this_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/kvm").exists():
        assert accelerator.why_not_kvm(QEMU, tmp_path / "kvm.json") == "there is no /dev/kvm"
        return
    tried: list[str] = []

    def fail(qemu: str, _accelerator: str) -> str:
        tried.append(qemu)
        return "no"

    monkeypatch.setattr(accelerator, "_try", fail)
    memory = tmp_path / "run" / "kvm.json"
    assert accelerator.why_not_kvm(QEMU, memory) == accelerator.why_not_kvm(QEMU, memory) == "no"
    assert tried == [QEMU]
    accelerator.why_not_kvm("/opt/qemu", memory)
    assert tried == [QEMU, "/opt/qemu"]
    stale = msgspec.json.decode(memory.read_bytes())
    memory.write_bytes(msgspec.json.encode(stale | {"boot": "another"}))
    accelerator.why_not_kvm("/opt/qemu", memory)
    memory.write_bytes(b"{")
    accelerator.why_not_kvm("/opt/qemu", memory)
    assert len(tried) == 4
    assert list(memory.parent.iterdir()) == [memory]
