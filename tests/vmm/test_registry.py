"""The records of VMs; processes that sleep stand for their QEMUs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import NotFoundError, OutboardError, RefusedError
from outboard.linux import proc
from outboard.vmm.registry import Registry, VmRecord


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        yield sleeper
        sleeper.kill()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


def enter(registry: Registry, name: str, process: subprocess.Popen[bytes], **changes: object) -> VmRecord:
    with registry.reserve(name) as directory:
        fields: dict[str, object] = {
            "name": name,
            "pid": process.pid,
            "start_time": proc.start_time(process.pid),
            "directory": directory,
            "accelerator": "tcg",
            "accelerator_reason": "a test",
            "memory_bytes": 1 << 30,
            "vcpus": 1,
            "guest_agent": True,
            "started": 0.0,
        }
        record = VmRecord(**(fields | changes))  # type: ignore[arg-type]  # a test's changes
        registry.add(record, 'name = "x"')
    return record


def test_a_record_is_found_listed_and_removed(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    assert registry.list() == []
    web, cache = enter(registry, "web", process), enter(registry, "cache", process, guest_agent=False)
    assert registry.get("web") == web
    assert registry.list() == [cache, web]
    assert web.spec_text() == 'name = "x"'
    assert web.agent_socket == registry.root / "vms" / "web" / "guest-agent.sock"
    assert cache.agent_socket is None
    registry.remove("web")
    registry.remove("web")
    assert registry.list() == [cache]
    assert not web.directory.exists()


def test_a_name_that_is_unknown_is_answered_with_near_ones(
    registry: Registry, process: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(NotFoundError, match="there are: none"):
        registry.get("web")
    enter(registry, "web", process)
    with pytest.raises(NotFoundError, match=r"no VM named wbe .*did you mean web\?"):
        registry.get("wbe")
    with pytest.raises(NotFoundError, match="there are: web"):
        registry.get("../run")


def test_a_vm_that_has_ended_is_told_and_its_name_is_free(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process)
    (record.directory / "left-over").touch()
    process.kill()
    process.wait()
    with pytest.raises(NotFoundError, match="has ended"):
        registry.get("web")
    assert [one.alive for one in registry.list()] == [False]
    with registry.reserve("web") as directory:
        assert list(directory.iterdir()) == []


def test_a_reused_pid_is_no_vm(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    record = enter(registry, "web", process, start_time=proc.start_time(process.pid) - 1)
    assert not record.alive


def test_a_name_is_taken_once(registry: Registry, process: subprocess.Popen[bytes]) -> None:
    enter(registry, "web", process)
    with pytest.raises(RefusedError, match="runs on this host already") as caught, registry.reserve("web"):
        pass
    assert caught.value.reason == "name-taken"
    with (
        registry.reserve("cache"),
        pytest.raises(RefusedError, match="is being started"),
        registry.reserve("cache"),
    ):
        pass


def test_a_start_that_fails_leaves_nothing(registry: Registry) -> None:
    def fail() -> None:
        with registry.reserve("web") as directory:
            (directory / "console.log").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list((registry.root / "vms").iterdir()) == []
    with registry.reserve("web") as directory:
        assert directory.exists()


def test_a_record_that_cannot_be_read_names_its_file(registry: Registry) -> None:
    with registry.reserve("web") as directory:
        (directory / "vm.json").write_text("{")
    with pytest.raises(OutboardError, match=r"vm\.json is no record of a VM"):
        registry.list()
