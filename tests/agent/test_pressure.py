"""A recorded pressure, and real engines of processes that give memory while it lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from outboard.agent.holding import CONTROL
from outboard.agent.manager import Manager
from outboard.agent.orders import Look, Release, ask
from outboard.agent.pressure import Pressure
from outboard.errors import KernelError
from outboard.reclaim.pools import Pools
from outboard.vmm.process import attach_process
from outboard.vmm.registry import Registry
from outboard.vmm.spec import VmSpec
from tests.agent.test_promises import start
from tests.support.requirements import require
from tests.support.target import Target

MIB = 1 << 20


class Recorded:
    """Pressure at some of its looks; it ends with the recording."""

    def __init__(self, looks: list[bool]) -> None:
        self._looks = iter(looks)

    def wait(self, seconds: float) -> bool:  # noqa: ARG002  # a real source's signature
        for pressed in self._looks:
            return pressed
        raise KernelError("poll of a pressure trigger", 19)


@pytest.fixture
def target() -> Iterator[Target]:
    require("root", "no-swap")
    with Target(mebibytes=16) as made:
        yield made


@pytest.mark.slow
def test_memory_is_taken_while_there_is_pressure(target: Target, tmp_path: Path) -> None:
    manager = Manager(tmp_path / "memory", partial(attach_process, target.pid), tmp_path / "swap")
    serving = threading.Thread(target=manager.serve)
    serving.start()
    control = tmp_path / "memory" / CONTROL
    registry = Registry(tmp_path / "run")
    start(registry, VmSpec(name="web", memory="16MiB"))
    start(registry, VmSpec(name="moving", memory="16MiB"))
    start(registry, VmSpec(name="large", memory="16MiB", page_size="2MiB"))
    ensured = []

    def ensure(vm: str) -> Path:
        ensured.append(vm)
        return control

    pressure = Pressure(Pools(64 * MIB, {}), registry, ensure, lambda vm: vm == "moving")
    pressure.run(Recorded([False, True, False]))
    assert set(ensured) == {"web"}
    reclaim = ask(control, Look()).reclaim
    assert reclaim is not None
    assert reclaim.target == 0
    deadline = time.monotonic() + 60
    while ask(control, Look()).used > 4 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ask(control, Release())
    serving.join(20)
    assert target.ask("t").startswith("touched ")
