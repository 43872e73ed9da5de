"""The engine reclaims a process's memory into its reserved swap file, down to the target and not below what is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from outboard.agent.holding import CONTROL
from outboard.agent.manager import Manager
from outboard.agent.orders import Evict, HandOver, Look, Looked, Reclaim, Release, ask
from outboard.agent.swapping import ReservedSwap
from outboard.stores.reservation import Reservation
from outboard.vmm.process import attach_process
from tests.support.requirements import require
from tests.support.target import Target

MIB = 1 << 20


@pytest.fixture
def target() -> Iterator[Target]:
    require("root", "no-swap", "block-file-system")
    with Target(mebibytes=32) as made:
        yield made


class Engine:
    """A manager in a thread."""

    def __init__(self, tmp_path: Path, pid: int, kept: int = 0, size: int = 64 * MIB) -> None:
        self.control = tmp_path / "memory" / CONTROL
        place = ReservedSwap(str(tmp_path / "swap"), size, "web", kept)
        self._manager = Manager(tmp_path / "memory", partial(attach_process, pid), place)
        self._thread = threading.Thread(target=self._manager.serve)
        self._thread.start()

    def until(self, used: int) -> Looked:
        deadline = time.monotonic() + 60
        while (looked := ask(self.control, Look())).used > used:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return looked

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def blocks(directory: Path) -> int:
    found = [directory / "reservation", directory / "ballast", *(directory / "vms").iterdir()]
    return sum(path.stat().st_blocks for path in found)


@pytest.mark.slow
def test_down_to_the_target_and_back(target: Target, tmp_path: Path) -> None:
    engine = Engine(tmp_path, target.pid)
    before = blocks(tmp_path / "swap")
    looked = ask(engine.control, Reclaim(target=20 * MIB))
    assert looked.reclaim is not None
    assert (looked.reclaim.target, looked.reclaim.goal) == (20 * MIB, 20 * MIB)
    looked = engine.until(20 * MIB)
    assert looked.used == 20 * MIB
    assert looked.idle is not None
    assert blocks(tmp_path / "swap") == before
    # A successor goes on, with another reservation configured meanwhile too.
    ask(engine.control, HandOver())
    engine.join()
    engine = Engine(tmp_path, target.pid, size=32 * MIB)
    looked = ask(engine.control, Look())
    assert looked.reclaim is not None
    assert looked.reclaim.target == 20 * MIB
    assert ask(engine.control, Reclaim(target=None)).reclaim is None
    assert target.ask("t").split()[1] == str(target.pages * (target.pages - 1) // 2)
    ask(engine.control, Release())
    engine.join()
    assert blocks(tmp_path / "swap") == before
    assert not list((tmp_path / "swap" / "vms").iterdir())


def test_what_is_kept_for_it_is_never_taken(target: Target, tmp_path: Path) -> None:
    engine = Engine(tmp_path, target.pid, kept=24 * MIB)
    assert ask(engine.control, Evict(idle=0.0)).used == 24 * MIB
    assert ask(engine.control, Evict(idle=0.0)).moved == 0
    ask(engine.control, Release())
    engine.join()


def test_units_that_have_become_empty_go_back_by_themselves(target: Target, tmp_path: Path) -> None:
    engine = Engine(tmp_path, target.pid)
    ask(engine.control, Evict(idle=0.0))
    lookout = Reservation(tmp_path / "swap", 64 * MIB)
    assert lookout.statistics().lent + lookout.statistics().moved == 32 * MIB
    assert target.ask("t").startswith("touched ")
    deadline = time.monotonic() + 20
    while lookout.statistics().lent + lookout.statistics().moved > 2 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lookout.close()
    ask(engine.control, Release())
    engine.join()


def test_a_process_that_ends_leaves_nothing(target: Target, tmp_path: Path) -> None:
    engine = Engine(tmp_path, target.pid)
    before = blocks(tmp_path / "swap")
    ask(engine.control, Evict(idle=0.0))
    target.__exit__(None, None, None)
    engine.join()
    assert blocks(tmp_path / "swap") == before
    assert not list((tmp_path / "swap" / "vms").iterdir())
