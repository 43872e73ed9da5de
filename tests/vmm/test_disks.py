"""Disks held still: QEMU writes to overlays from then on, and another VM begins with what lies below."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import OutboardError, RefusedError
from outboard.vmm import disks
from outboard.vmm.monitor import Monitor
from outboard.vmm.spec import Disk, VmSpec
from tests.support.machine import Machine
from tests.support.requirements import require


def information(path: str) -> dict[str, object]:
    said = subprocess.run(["qemu-img", "info", "-U", "--output=json", path], capture_output=True, check=True).stdout
    found: dict[str, object] = json.loads(said)
    return found


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    require("qemu")
    made = []
    for index, kind in enumerate(("raw", "qcow2", "raw")):
        path = tmp_path / f"{index}.{kind}"
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, "4M"], check=True)
        made.append(Disk(str(path), kind, read_only=index == 2))  # type: ignore[arg-type]  # of two words
    return VmSpec(name="web", memory="64MiB", disks=made)


@pytest.fixture
def monitor(spec: VmSpec) -> Iterator[Monitor]:
    arguments = []
    for index, disk in enumerate(spec.disks):
        file = {"driver": "file", "filename": disk.path, "read-only": disk.read_only}
        node = {"node-name": f"disk{index}", "driver": disk.format, "read-only": disk.read_only, "file": file}
        arguments += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=disk{index}"]
    with Machine(64, *arguments) as machine, Monitor.connect(machine.qmp) as made:
        yield made


def test_each_disk_that_is_written_to_gets_an_overlay(spec: VmSpec, monitor: Monitor) -> None:
    assert disks.described(monitor, spec) == spec
    below = [disk.path for disk in spec.disks]
    for _ in range(2):
        assert disks.freeze(monitor, spec)
        now = disks.described(monitor, spec)
        assert [disk.format for disk in now.disks] == ["qcow2", "qcow2", "raw"]
        assert now.disks[2] == spec.disks[2]
        for index in (0, 1):
            assert now.disks[index].path.startswith(spec.disks[index].path + ".")
            assert information(now.disks[index].path)["full-backing-filename"] == below[index]
        below = [disk.path for disk in now.disks]


def test_disks_change_together_or_not_at_all(spec: VmSpec, monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter([f"{spec.disks[0].path}.00000000.qcow2", "/nowhere/1.qcow2"])
    monkeypatch.setattr(disks, "_overlay_of", lambda _: next(names))
    with pytest.raises(OutboardError, match="nowhere"):
        disks.freeze(monitor, spec)
    assert disks.described(monitor, spec) == spec


def test_a_disk_that_is_not_there_any_more_is_told(spec: VmSpec, monitor: Monitor) -> None:
    more = VmSpec(name="web", memory="64MiB", disks=[*spec.disks, Disk("/srv/x.raw")])
    with pytest.raises(RefusedError) as caught:
        disks.freeze(monitor, more)
    assert caught.value.reason == "disk-changed"


def test_a_vm_without_disks_to_write_to_needs_nothing(spec: VmSpec, monitor: Monitor) -> None:
    assert not disks.freeze(monitor, VmSpec(name="web", memory="64MiB", disks=spec.disks[2:]))


def test_another_vm_writes_to_overlays_of_its_own(spec: VmSpec) -> None:
    clone = disks.cloned(spec)
    assert clone.disks[2] == spec.disks[2]
    for index in (0, 1):
        found = information(clone.disks[index].path)
        assert (found["format"], found["full-backing-filename"]) == ("qcow2", spec.disks[index].path)
    disks.remove_clones(clone)
    disks.remove_clones(clone)
    assert sorted(path.name for path in Path(spec.disks[0].path).parent.iterdir()) == ["0.raw", "1.qcow2", "2.raw"]


def test_a_clone_that_cannot_be_made_leaves_nothing(spec: VmSpec) -> None:
    Path(spec.disks[1].path).unlink()
    with pytest.raises(OutboardError, match=r"overlay of .*1\.qcow2"):
        disks.cloned(spec)
    assert sorted(path.name for path in Path(spec.disks[0].path).parent.iterdir()) == ["0.raw", "2.raw"]
