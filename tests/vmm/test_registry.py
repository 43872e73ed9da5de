"""The VMs of a host: names that are taken, records of what has ended, and nothing half-made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from outboard.errors import NotFoundError, OutboardError, RefusedError
from outboard.linux import proc
from outboard.vmm.registry import Registry, VmRecord


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """What stands in for a QEMU: the registry only asks whether it lives."""
    with subprocess.Popen(["sleep", "1000"]) as running:
        yield running
        running.kill()


def enter(registry: Registry, name: str, pid: int, guest_agent: bool = True) -> VmRecord:
    with registry.reserve(name) as directory:
        record = VmRecord(
            name=name,
            pid=pid,
            start_time=proc.start_time(pid),
            directory=directory,
            accelerator="tcg",
            accelerator_reason="its description says so",
            memory_bytes=1 << 30,
            vcpus=1,
            guest_agent=guest_agent,
            started=0.0,
        )
        registry.add(record, f'name = "{name}"\n')
    return record


def test_nothing_there(registry: Registry) -> None:
    assert registry.list() == []
    with pytest.raises(NotFoundError, match=r"no VM named web .* there are: none"):
        registry.get("web")
    registry.remove("web")
    assert not registry.root.exists()


def test_what_was_added_is_found(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    other = enter(registry, "db", process.pid, guest_agent=False)
    assert registry.get("web") == record
    assert registry.list() == [other, record]
    assert record.spec_text() == 'name = "web"\n'
    assert record.agent_socket == record.directory / "guest-agent.sock"
    assert other.agent_socket is None
    with pytest.raises(NotFoundError, match="did you mean web"):
        registry.get("wbe")


@pytest.mark.parametrize("name", ["", ".", "..", "../vms/web", "/etc", "web/"])
def test_a_name_is_no_path(registry: Registry, process: subprocess.Popen[bytes], name: str) -> None:
    enter(registry, "web", process.pid)
    with pytest.raises(NotFoundError):
        registry.get(name)


def test_a_name_is_taken_while_its_vm_lives(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    with pytest.raises(RefusedError, match="outboard stop web") as caught, registry.reserve("web"):
        pytest.fail("two VMs have one name")
    assert caught.value.reason == "name-taken"
    assert registry.get("web") == record


def test_a_name_is_taken_while_its_vm_starts(registry: Registry) -> None:
    with registry.reserve("web"):
        with pytest.raises(RefusedError, match="being started") as caught, registry.reserve("web"):
            pytest.fail("two VMs have one name")
        assert caught.value.reason == "name-taken"
        assert registry.list() == []


def test_a_start_that_fails_leaves_nothing(registry: Registry) -> None:
    def start() -> None:
        with registry.reserve("web") as directory:
            (directory / "qemu.log").write_text("said")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start()
    assert not (registry.root / "vms" / "web").exists()
    with registry.reserve("web") as directory:
        assert list(directory.iterdir()) == []


def test_an_ended_vm_is_told_and_its_name_is_free(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    process.kill()
    process.wait()
    assert not record.alive
    with pytest.raises(NotFoundError, match="has ended"):
        registry.get("web")
    assert registry.list() == [record]
    with registry.reserve("web") as directory:
        assert list(directory.iterdir()) == []


def test_a_zombie_has_ended(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not record.alive


def test_a_reused_pid_is_another_process(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    earlier = msgspec.structs.replace(record, start_time=record.start_time - 1)
    assert not earlier.alive


def test_what_is_no_record_names_its_file(registry: Registry) -> None:
    with registry.reserve("web") as directory:
        (directory / "vm.json").write_text("{}")
    with pytest.raises(OutboardError, match=r"vm\.json is no record"):
        registry.get("web")


def test_a_removed_vm_is_gone(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process.pid)
    registry.remove("web")
    registry.remove("web")
    assert registry.list() == []
    assert record.alive
