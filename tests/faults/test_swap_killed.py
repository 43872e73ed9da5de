"""Whoever moves blocks is killed at each of its system calls: together they are the same afterwards, to the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.stores.moving import UNIT_PAGES
from outboard.stores.reservation import Reservation
from outboard.stores.swap import SwapStore
from tests.support.killing import killed_at
from tests.support.loops import KINDS, fill, mounted, reserve
from tests.support.requirements import require

pytestmark = pytest.mark.slow

SIZE = 8 << 20


def content(pages: int) -> NDArray[np.uint8]:
    return np.repeat(np.arange(pages, dtype=np.uint8), 4096)


class Scene:
    """A store of 4 MiB that keeps some pages throughout, in a reservation whose blocks are counted."""

    def __init__(self, disk: Path, beside: Path) -> None:
        self.directory, self.beside = disk / "swap", beside
        beside.mkdir()
        self.engage()
        self.kept = self.store.put(content(200))
        self.blocks = self.count()
        assert self.store.lent[0] == (2 if disk.name == "ext4-lent" else 1)

    def engage(self) -> None:
        self.store = SwapStore(reserve(self.directory, SIZE), "web", 4 * UNIT_PAGES, self.beside)

    def count(self) -> int:
        found = [self.directory / "reservation", self.directory / "ballast", *(self.directory / "vms").iterdir()]
        return sum(path.stat().st_blocks for path in found)

    def take(self) -> None:
        self.store.put(content(500))

    def give(self) -> None:
        self.store.retain(self.kept)

    def survive(self) -> None:
        """A successor, and nobody has lost anything."""
        self.engage()
        self.store.retain(self.kept)
        assert self.count() == self.blocks
        into: NDArray[np.uint8] = np.empty(self.kept.size * 4096, dtype=np.uint8)
        self.store.fetch(self.kept, into)
        assert np.array_equal(into, content(200))
        self.store.close()
        with_it = Reservation(self.directory, SIZE)
        now = with_it.statistics()
        kept = (0, 1 << 20) if self.directory.parent.name == "ext4-lent" else (1 << 20, 0)
        assert (now.moved, now.lent, now.lost, now.blocks) == (*kept, 0, now.blocks_reserved)
        with_it.close()


@pytest.fixture(params=(*KINDS, "ext4"))
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    require("root", "loop-file-systems")
    with mounted(request.param, tmp_path) as disk:
        made = Scene(disk, tmp_path / "beside")
        made.store.close()
        made.survive()
        yield made


def kills(scene: Scene, prepare: Callable[[], object], work: Callable[[], object]) -> int:
    for stop in range(1, 2000):
        killed = killed_at(stop, prepare, work)
        scene.survive()
        if not killed:
            return stop
    raise AssertionError("the work never gets through")


def test_while_units_are_taken(scene: Scene) -> None:
    assert kills(scene, scene.engage, scene.take) > 20


def test_while_units_are_given_back(scene: Scene) -> None:
    def prepare() -> None:
        scene.engage()
        scene.take()

    assert kills(scene, prepare, scene.give) > 5


def test_while_units_are_lent_on_a_full_disk(scene: Scene) -> None:
    # Nobody snatches anything: who dies between two steps finds his block again.
    filler = fill(scene.directory.parent)
    assert kills(scene, scene.engage, scene.take) > 20
    filler.unlink()


@pytest.mark.parametrize("scene", ["ext4"], indirect=True)
def test_while_a_swap_file_is_made_and_removed(scene: Scene) -> None:
    def work() -> None:
        other = reserve(scene.directory, SIZE)
        file = other.open("other", 2)
        other.take(file, 1, content(3))
        other.discard("other")

    def clean() -> None:
        made = Reservation(scene.directory, SIZE)
        made.discard("other")
        made.close()

    for stop in range(1, 2000):
        killed = killed_at(stop, lambda: None, work)
        clean()
        scene.survive()
        if not killed:
            assert stop > 20
            return


def test_while_it_is_made(tmp_path: Path) -> None:
    require("root", "loop-file-systems")
    with mounted("ext4-lent", tmp_path) as disk:
        for stop in range(1, 2000, 2):
            killed = killed_at(stop, lambda: None, lambda: Reservation(disk / "swap", 2 << 20))
            made = Reservation(disk / "swap", 2 << 20)
            now = made.statistics()
            assert now.here == made.units << 20
            assert now.blocks == now.blocks_reserved >= made.units * 2048
            made.close()
            if not killed:
                assert stop > 20
                return
            for path in (disk / "swap").iterdir():
                if path.is_file():
                    path.unlink()
