"""outboard run and outboard stop, as a person types them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from outboard.cli import outboard
from outboard.errors import NotFoundError, RefusedError, SpecError
from outboard.vmm.launch import stop
from outboard.vmm.registry import Registry
from tests.support.requirements import require


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    require("qemu")
    monkeypatch.setenv("OUTBOARD_RUNTIME_DIR", str(tmp_path / "run"))
    made = Registry(tmp_path / "run")
    yield made
    for record in made.list():
        stop(record, made)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "web.toml"
    path.write_text('name = "web"\nmemory = "64MiB"\nextra_args = ["-S"]\n')
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(outboard, arguments, standalone_mode=False)


def test_run_and_stop_for_programs(registry: Registry, file: Path) -> None:
    started = invoke("run", str(file), "--accel", "tcg", "-o", "json")
    assert started.exception is None
    record = registry.get("web")
    assert msgspec.json.decode(started.stdout) == {
        "schema": "outboard.run.v1",
        "vm": "web",
        "pid": record.pid,
        "accelerator": "tcg",
        "accelerator_reason": record.accelerator_reason,
        "memory_bytes": 64 << 20,
        "vcpus": 1,
        "qmp": str(record.qmp_socket),
        "console": str(record.console),
    }
    assert isinstance(invoke("run", str(file), "--accel", "tcg").exception, RefusedError)
    stopped = invoke("stop", "web", "-o", "json")
    assert msgspec.json.decode(stopped.stdout) == {"schema": "outboard.stop.v1", "vm": "web"}
    assert registry.list() == []


def test_run_and_stop_for_people(registry: Registry, file: Path) -> None:
    started = invoke("run", str(file), "--accel", "tcg")
    assert "web" in started.stdout
    assert "tcg" in started.stdout
    assert started.stderr == ""
    assert invoke("stop", "web").stdout == "web has ended\n"
    assert isinstance(invoke("stop", "web").exception, NotFoundError)
    assert registry.list() == []


def test_a_vm_that_falls_back_to_tcg_is_told_why(
    registry: Registry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outboard.vmm.launch.why_not_kvm", lambda _qemu, _cpu, _memory: "it is a test")
    started = invoke("run", str(file))
    assert started.stderr == "web runs many times slower than it could: no KVM: it is a test\n"
    assert registry.get("web").accelerator == "tcg"


def test_a_wrong_file_is_told(registry: Registry, file: Path) -> None:
    file.write_text('name = "web"\nmemmory = "1GiB"\n')
    failed = invoke("run", str(file)).exception
    assert isinstance(failed, SpecError)
    assert str(failed) == f"{file}: no key is called 'memmory'; did you mean 'memory'?"
    assert isinstance(invoke("run", str(file.parent / "none")).exception, NotFoundError)
    assert registry.list() == []


def test_stop_forgets_a_vm_that_has_ended(registry: Registry, file: Path) -> None:
    invoke("run", str(file), "--accel", "tcg")
    os.kill(registry.get("web").pid, signal.SIGKILL)
    os.waitpid(registry.list()[0].pid, 0)
    assert len(registry.list()) == 1
    assert invoke("stop", "web").exception is None
    assert registry.list() == []
