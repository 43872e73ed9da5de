"""Snapshots of a real guest: taken while it writes, restored while it runs, whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guest.build import Image
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Look, Looked, ask
from outboard.errors import OutboardError
from outboard.linux import pidfd, proc
from tests.support.cluster import Cluster, Host, Vm, wait_for

pytestmark = pytest.mark.slow


def told(host: Host, *arguments: str) -> dict[str, Any]:
    done = host.outboard("snapshot", *arguments, "-o", "json")
    assert done.returncode == 0, done.stderr + host.log()[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def look(host: Host, vm: str) -> Looked:
    """How the memory of a managed VM is, once an engine answers."""
    found: list[Looked] = []

    def answered() -> bool:
        with contextlib.suppress(OutboardError):
            found.append(ask(host.registry.get(vm).memory_directory / CONTROL, Look(), 5.0))
        return bool(found)

    wait_for(answered, "an engine's answer")
    return found[-1]


@pytest.fixture
def vm_with_disk(cluster: Cluster, image: Image, tmp_path: Path) -> Iterator[Vm]:
    """One whose guest has a disk that it could write to."""
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(8 << 20)
    tables = f'\n[[disks]]\npath = "{disk}"\n'
    made = Vm(cluster, image, f"vm-{secrets.token_hex(3)}", tables=tables)
    made.write()
    yield made
    cluster.a.outboard("stop", made.name)


def test_taken_and_restored(vm_with_disk: Vm, tmp_path: Path) -> None:
    vm = vm_with_disk
    host = vm.cluster.a
    first = told(host, "create", vm.name)
    # Nobody managed it before, and nobody does now.
    assert not vm.record("a").memory_directory.exists()
    assert not [link for link in proc.descriptors(vm.record("a").pid).values() if "userfaultfd" in link]
    assert first["zero"] + first["new"] <= first["memory"]
    second = told(host, "create", vm.name, "--incremental")
    assert second["parent"] == first["id"]
    # Two overlays, one above the other, and the description names the upper one.
    assert len(list(tmp_path.glob("disk.raw.*.qcow2"))) == 2
    assert str(tmp_path / "disk.raw.") in vm.record("a").spec_text()
    assert second["new"] < first["new"]
    assert told(host, "verify", second["id"])["files"] == 2
    vm.verify("a")
    clone = copy.copy(vm)
    clone.name = f"{vm.name}-2"
    try:
        assert told(host, "restore", second["id"], "--name", clone.name)["running"]
        # It finds every page as it was at the instant, and goes on writing.
        clone.verify("a")
        assert len(list(tmp_path.glob("disk.raw.*.qcow2"))) == 3
        looked = look(host, clone.name)
        assert looked.faults > 0
        assert looked.failure is None
        os.kill(looked.engine, signal.SIGKILL)
        wait_for(lambda: not pidfd.alive(looked.engine), "the engine's end")
        wait_for(lambda: look(host, clone.name).snapshot == 0, "all pages")
        clone.verify("a")
    finally:
        host.outboard("stop", clone.name)
    vm.verify("a")


def _any(directory: Path, pattern: str) -> bool:
    return any(directory.glob(pattern))


def test_an_engine_that_is_killed_lets_the_guest_go_on(vm: Vm) -> None:
    host = vm.cluster.a
    snapshots = host.directory / "state" / "snapshots"
    assert host.outboard("evict", vm.name, "--most", "1MiB", "--idle", "0.1").returncode == 0
    for marked in (False, True):
        before = look(host, vm.name).engine
        taking = host.popen("snapshot", "create", vm.name)
        mark = vm.record("a").memory_directory / "snapshotting"
        # The guest stands still for some milliseconds alone.
        sign = (mark.parent, mark.name) if marked else (snapshots, "*.partial")
        wait_for(partial(_any, *sign), "a snapshot that is begun", every=0.0005)
        os.kill(before, signal.SIGKILL)
        assert taking.wait(60) == 8
        taking.communicate()
        wait_for(lambda: not pidfd.alive(before), "the engine's end")  # noqa: B023
        look(host, vm.name)
        vm.verify("a")
        assert not mark.exists()
    taken = told(host, "create", vm.name)
    assert [path.name for path in snapshots.glob(f"{vm.name}*")] == [f"{taken['id']}.snap"]
    assert not list(snapshots.glob("*.partial"))
    vm.verify("a")
    other = f"{vm.name}-other"
    restoring = host.popen("snapshot", "restore", taken["id"], "--name", other)
    directory = host.directory / "run" / "vms" / other / "memory"
    wait_for((directory / "restoring").exists, "a restoration that is begun")
    os.kill(int((directory / "lock").read_text()), signal.SIGKILL)
    assert restoring.wait(60) == 8
    restoring.communicate()
    wait_for(lambda: not host.has(other), "the end of a VM that has never run")
    vm.verify("a")
