"""The pager's process is killed at each of its system calls in turn, under writers that verify what they wrote."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.pager.on_disk import OnDisk
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.spec import Disk
from tests.support.killing import killed_at
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

pytestmark = pytest.mark.slow

PAGES = 1024
SOME = np.array([[0, 3], [40, 1], [100, 30], [700, 2]], dtype=np.int64)


class Scene:
    """A target with three writers, and what is left of its pagers."""

    def __init__(self, directory: Path) -> None:
        self.target = Target(mebibytes=PAGES >> 8)
        self.guest = guest_of(self.target)
        self.journal = directory
        self.pager: Pager | None = None
        self.chance = random.Random(7)
        self.target.ask("g")
        self.writing = True
        self.disks: list[Disk] = []
        self.on_disk: OnDisk | None = None

    def engage(self) -> Pager:
        stores = {where: FileStore(self.journal / where.name, PAGES) for where in (Where.POOL, Where.FILE)}
        if self.disks:
            self.on_disk = OnDisk(self.disks, self.journal / "indexes", self.journal, PAGES)
            self.on_disk.await_indexes()
        self.pager = Pager(self.guest, Residency(PAGES, self.journal), stores, on_disk=self.on_disk)
        return self.pager

    def put_on_disk(self, first: int, count: int) -> None:
        """Have a disk that holds pages as they are now."""
        content = bytearray(count * PAGE_SIZE)
        self.guest.memory.read_into(first, memoryview(content))
        image = self.journal / "image"
        image.write_bytes(content)
        self.disks = [Disk(path=str(image), read_only=True)]

    def calm(self) -> None:
        """Stop the writers, who look whether everything is as they left it. Idempotent."""
        if self.writing:
            self.writing = False
            assert self.target.ask("s").startswith("bad 0 of ")

    def some(self) -> PageSet:
        return PageSet.from_runs(PAGES, SOME)

    def survive(self) -> None:
        """A successor takes over, moves pages about, and goes in peace."""
        pager = self.engage()
        pages = PageSet.from_runs(PAGES, np.array([[self.chance.randrange(900), 100]]))
        pager.evict(pages, self.chance.choice([Where.POOL, Where.FILE]))
        pager.fetch(PageSet.from_runs(PAGES, np.array([[self.chance.randrange(900), 100]])))
        assert pager.failure is None
        pager.close()
        if self.on_disk is not None:
            self.on_disk.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    require("root")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        made = Scene(directory)
        with made.target, made.guest:
            yield made
            last = made.engage()
            made.calm()
            assert made.target.ask("t").split()[1] == str(PAGES * (PAGES - 1) // 2)
            last.release()
    finally:
        shutil.rmtree(directory)


def kills(
    scene: Scene,
    prepare: Callable[[], object],
    work: Callable[[], object],
    thread: str | None = None,
    most: int = 1000,
) -> int:
    """Kill at every stop until the work gets through, or ``most`` times; how many times."""
    for stop in range(1, most):
        if not killed_at(stop, prepare, work, thread):
            scene.survive()
            return stop
        scene.survive()
    return most


@pytest.mark.parametrize("to", [Where.POOL, Where.FILE])
def test_while_evicting(scene: Scene, to: Where) -> None:
    def work() -> None:
        assert scene.pager is not None
        scene.pager.evict(scene.some(), to)

    assert kills(scene, scene.engage, work) > 20


def test_while_dropping_what_a_disk_holds(scene: Scene) -> None:
    scene.engage()
    scene.calm()
    assert scene.pager is not None
    scene.pager.close()
    scene.put_on_disk(90, 100)

    def prepare() -> None:
        scene.engage().fetch(PageSet.full(PAGES))

    def work() -> None:
        assert scene.pager is not None
        scene.pager.evict(scene.some(), Where.FILE)

    assert kills(scene, prepare, work) > 20
    last = scene.engage()
    last.evict(scene.some(), Where.FILE)
    # Whoever survived a death may have left others there.
    assert len(last.residency.pages_at(Where.DISK) & scene.some()) == 30
    last.close()


@pytest.mark.parametrize("at", [Where.POOL, Where.FILE])
def test_while_fetching(scene: Scene, at: Where) -> None:
    # Nobody else brings them back meanwhile.
    scene.engage()
    scene.calm()
    assert scene.pager is not None
    scene.pager.close()

    def prepare() -> None:
        scene.engage().evict(scene.some(), at)

    def work() -> None:
        assert scene.pager is not None
        scene.pager.fetch(PageSet.full(PAGES))

    assert kills(scene, prepare, work) > 10


def test_while_taking_over(scene: Scene) -> None:
    def leave() -> None:
        scene.engage().evict(scene.some(), Where.POOL)
        assert scene.pager is not None
        scene.pager.close()

    assert kills(scene, leave, scene.engage) > 20


def test_while_serving_faults(scene: Scene) -> None:
    def work() -> None:
        # The writers fault for as long as there is something to fault on.
        assert scene.pager is not None
        while True:
            scene.pager.evict(PageSet.full(PAGES), Where.FILE)

    assert kills(scene, scene.engage, work, "outboard-faults", most=60) == 60
