"""What becomes of a QEMU that was to take a VM in when the engine behind it dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from outboard.agent.arrivals import Arrivals
from outboard.agent.config import AgentConfig
from outboard.agent.engine import ARRIVING
from outboard.agent.engines import Engines
from outboard.agent.succession import keep_task
from outboard.agent.tasks import Receive
from outboard.agent.verdicts import Verdicts
from outboard.migrate.messages import Prepare
from outboard.vmm.launch import launch, stop
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import VmSpec
from tests.support.requirements import require

SPEC = VmSpec(name="web", memory="64MiB", accel="tcg", extra_args=["-S"])
PREPARE = Prepare(migration="m1", vm="web", spec="", layout=[(0, 100, 0)], running=True)


class Scene:
    """The arrivals of a host, and VMs that run there."""

    def __init__(self, directory: Path) -> None:
        self.registry = Registry(directory / "run")
        self.verdicts = Verdicts(directory / "incoming")
        config = AgentConfig(name="b", listen="127.0.0.1")
        self.arrivals = Arrivals(config, self.registry, Engines(self.registry, directory), self.verdicts)
        self.task = Receive(
            source="a", listen="127.0.0.1", ports=(1, 2), prepare=PREPARE, verdicts=str(self.verdicts.directory)
        )

    def arriving(self, record: VmRecord, migration: str) -> None:
        journal = record.directory / ARRIVING
        journal.mkdir()
        prepare = msgspec.structs.replace(PREPARE, migration=migration)
        keep_task(journal, msgspec.structs.replace(self.task, prepare=prepare))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    require("qemu")
    made = Scene(tmp_path)
    yield made
    for record in made.registry.list():
        stop(record, made.registry)


def left(_scene: Scene, _record: VmRecord) -> None:
    """The engine died before it could say what it was to do."""


def said(scene: Scene, record: VmRecord) -> None:
    scene.arriving(record, "m1")


@pytest.mark.parametrize("leave", [left, said])
def test_the_qemu_that_waits_for_the_vm_ends(scene: Scene, leave: Callable[[Scene, VmRecord], None]) -> None:
    record = launch(SPEC, scene.registry, incoming=True)
    leave(scene, record)
    scene.arrivals.succeed(scene.task)
    assert not record.alive
    assert scene.registry.list() == []
    assert not scene.verdicts.commit("m1")


def test_what_is_left_of_one_whose_qemu_has_ended_is_forgotten(scene: Scene) -> None:
    record = launch(SPEC, scene.registry, incoming=True)
    scene.arriving(record, "m1")
    os.kill(record.pid, signal.SIGKILL)
    os.waitpid(record.pid, 0)
    scene.arrivals.succeed(scene.task)
    assert not record.directory.exists()


def test_a_vm_of_that_name_that_runs_here_goes_on(scene: Scene) -> None:
    record = launch(SPEC, scene.registry)
    scene.arrivals.succeed(scene.task)
    assert record.alive


def test_a_vm_that_comes_by_another_migration_goes_on(scene: Scene) -> None:
    record = launch(SPEC, scene.registry, incoming=True)
    scene.arriving(record, "m2")
    scene.arrivals.succeed(scene.task)
    assert record.alive


def test_nobody_there(scene: Scene) -> None:
    scene.arrivals.succeed(scene.task)
    assert scene.registry.list() == []
