"""The trial guest, under TCG, which is everywhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from outboard.vmm import accelerator
from outboard.vmm.spec import CPU
from tests.support.requirements import require

QEMU = "qemu-system-x86_64"


def test_the_trial_guest_counts_and_says_so() -> None:
    require("qemu")
    assert accelerator._try(QEMU, CPU, "tcg") is None


def test_a_qemu_that_fails_is_quoted() -> None:
    require("qemu")
    assert "nonsense" in (accelerator._try(QEMU, CPU, "nonsense") or "")
    assert accelerator._try("/nowhere/qemu", CPU, "tcg") == "/nowhere/qemu could not be run: No such file or directory"


def test_a_guest_that_crawls_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu")
    monkeypatch.setattr(accelerator, "_COUNT", 0xFFFFFFFF)
    monkeypatch.setattr(accelerator, "_LIMIT_S", 0.5)
    assert "instructions are emulated" in (accelerator._try(QEMU, CPU, "tcg") or "")


def test_the_answer_is_remembered_for_this_boot_and_this_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/kvm").exists():
        assert accelerator.why_not_kvm(QEMU, CPU, tmp_path / "kvm.json") == "there is no /dev/kvm"
        return
    tried: list[str] = []

    def fail(qemu: str, cpu: str, _accelerator: str) -> str:
        tried.append(f"{qemu} {cpu}")
        return "no"

    monkeypatch.setattr(accelerator, "_try", fail)
    memory = tmp_path / "run" / "kvm.json"
    assert accelerator.why_not_kvm(QEMU, CPU, memory) == accelerator.why_not_kvm(QEMU, CPU, memory) == "no"
    assert tried == [f"{QEMU} {CPU}"]
    accelerator.why_not_kvm("/opt/qemu", CPU, memory)
    accelerator.why_not_kvm("/opt/qemu", "EPYC", memory)
    assert tried[1:] == [f"/opt/qemu {CPU}", "/opt/qemu EPYC"]
    stale = msgspec.json.decode(memory.read_bytes())
    memory.write_bytes(msgspec.json.encode(stale | {"boot": "another"}))
    accelerator.why_not_kvm("/opt/qemu", "EPYC", memory)
    memory.write_bytes(b"{")
    accelerator.why_not_kvm("/opt/qemu", "EPYC", memory)
    assert len(tried) == 5
    assert list(memory.parent.iterdir()) == [memory]
