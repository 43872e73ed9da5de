"""What an engine says of a QEMU that does not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.agent.engine import honest_about
from outboard.errors import OutboardError, UnreachableError
from outboard.vmm.launch import launch, stop
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import VmSpec
from tests.support.requirements import require


@pytest.fixture
def record(tmp_path: Path) -> Iterator[VmRecord]:
    require("qemu")
    registry = Registry(tmp_path)
    made = launch(VmSpec(name="web", memory="64MiB", accel="tcg", extra_args=["-S"]), registry)
    yield made
    stop(made, registry)


def test_one_that_has_ended_is_said_to_have(record: VmRecord) -> None:
    os.kill(record.pid, signal.SIGKILL)
    with pytest.raises(OutboardError, match="QEMU of web, process") as told, honest_about(record):
        raise UnreachableError("its monitor is gone")
    assert told.value.exit_code == 1


def test_one_that_lives_does_not_answer(record: VmRecord) -> None:
    with pytest.raises(UnreachableError, match="its monitor is gone"), honest_about(record):
        raise UnreachableError("its monitor is gone")
