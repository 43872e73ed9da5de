"""An engine that shares pages is killed at each of its system calls in turn, under writers that verify theirs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.linux import memfd, proc
from outboard.pager.overlay import Overlay
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from tests.support.killing import killed_at
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

pytestmark = pytest.mark.slow

PAGES = 1024
SPANS = np.array([[1, 1, 3], [40, 40, 1], [100, 100, 30], [700, 700, 2]], dtype=np.int64)
ALL = PageSet.full(PAGES)


class Scene:
    """A target with three writers that rest between two writes, and what is left of its engines."""

    def __init__(self, directory: Path) -> None:
        self.target = Target(mebibytes=PAGES >> 8)
        self.guest = guest_of(self.target)
        self.journal = directory
        self.pool = memfd.create("test-pool", PAGES * PAGE_SIZE)
        self.overlay: Overlay | None = None
        self.shared = 0
        self.target.ask("p 50")
        self.target.ask("g")

    def engage(self) -> Pager:
        stores = {Where.POOL: FileStore(self.journal / "pool", PAGES)}
        pager = Pager(self.guest, Residency(PAGES, self.journal), stores)
        self.overlay = pager.share_from(self.pool)
        return pager

    def share(self) -> None:
        """Put what pages hold now into the pool, and share those that have not changed since."""
        assert self.overlay is not None
        for first, _, count in SPANS.tolist():
            content = bytearray(count * PAGE_SIZE)
            self.guest.memory.read_into(first, memoryview(content))
            os.pwrite(self.pool, content, first * PAGE_SIZE)
        self.overlay.share(SPANS)

    def unshare(self) -> None:
        assert self.overlay is not None
        self.overlay.unshare(ALL)

    def survive(self) -> None:
        """A successor takes over, gives everything back, and goes in peace."""
        pager = self.engage()
        self.shared += len(pager.residency.pages_at(Where.SHARED))
        # A page that is being answered for at that moment is passed over.
        while pager.residency.count(Where.SHARED):
            self.unshare()
        assert pager.failure is None
        pager.close()
        assert [thread.name for thread in proc.threads(self.target.pid)] == ["target"] * 4


@pytest.fixture
def scene() -> Iterator[Scene]:
    require("root")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        made = Scene(directory)
        with made.target, made.guest:
            yield made
            last = made.engage()
            assert made.target.ask("s").startswith("bad 0 of ")
            assert made.target.ask("t").split()[1] == str(PAGES * (PAGES - 1) // 2)
            last.release()
        os.close(made.pool)
    finally:
        shutil.rmtree(directory)


def kills(scene: Scene, prepare: Callable[[], object], work: Callable[[], object]) -> int:
    """Kill at every stop until the work gets through; how many times."""
    stop = 1
    while killed_at(stop, prepare, work):
        scene.survive()
        stop += 1
    scene.survive()
    return stop


def test_while_sharing(scene: Scene) -> None:
    assert kills(scene, scene.engage, scene.share) > 40
    assert scene.shared > 0


def test_while_un_sharing(scene: Scene) -> None:
    def prepare() -> None:
        scene.engage()
        scene.share()

    assert kills(scene, prepare, scene.unshare) > 40
    assert scene.shared > 0


def test_while_zapping(scene: Scene) -> None:
    def prepare() -> None:
        scene.engage()
        scene.share()

    def work() -> None:
        assert scene.overlay is not None
        scene.overlay.zap(ALL)

    assert kills(scene, prepare, work) > 10
