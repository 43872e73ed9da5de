"""A live process whose pages are in a snapshot: they come by a fault, with those beside them, or ahead of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import DamagedPageError
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.stores.snapshot import SnapshotStore
from outboard.stores.snapshot_format import CHUNK_PAGES
from tests.support.cluster import wait_for
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.snapshots import name, write
from tests.support.target import Target

PAGES = 1024
SUM = PAGES * (PAGES - 1) // 2


def numbered() -> NDArray[np.uint8]:
    """The target's own content: each page holds its number; the last hundred are all the same."""
    found = np.zeros((PAGES, PAGE_SIZE // 8), dtype=np.uint64)
    found[:, 0] = np.arange(PAGES)
    found[-100:] = 5
    return found.view(np.uint8).reshape(-1)


class Scene:
    """A target that has lost its memory, and a pager that has it in a snapshot."""

    def __init__(self, directory: Path, disk: Path) -> None:
        self.directory, self.disk = directory, disk
        self.target = Target(mebibytes=PAGES >> 8)
        self.guest = guest_of(self.target)
        first = write(disk, 0, numbered())
        changed = numbered()
        changed.reshape(-1, PAGE_SIZE)[300:400, 8] = 1
        write(disk, 1, changed, first)
        self.memory = changed
        self.store = SnapshotStore(disk, name(1))
        self.pool = FileStore(directory / "pool", PAGES)
        self.guest.memory.punch(0, PAGES)
        residency = Residency(PAGES, directory)
        residency.where[:], residency.locator[:] = self.store.where, self.store.locators
        self.pager = Pager(self.guest, residency, {Where.POOL: self.pool, Where.SNAPSHOT: self.store})

    def again(self) -> None:
        """A successor takes over from an engine that has died."""
        self.pager.close()
        self.store.close()
        self.store = SnapshotStore(self.disk, name(1))
        residency = Residency(PAGES, self.directory)
        self.pager = Pager(self.guest, residency, {Where.POOL: self.pool, Where.SNAPSHOT: self.store})

    def whole(self) -> None:
        assert self.pager.failure is None
        found = np.empty(PAGES * PAGE_SIZE, dtype=np.uint8)
        self.pager.fetch(PageSet.full(PAGES))
        self.guest.memory.read_into(0, found.data)
        assert np.array_equal(found, self.memory)

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.pager.close()
        self.store.close()
        self.pool.close()
        self.guest.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    require("root")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = Scene(directory, tmp_path)
    yield made
    made.close()
    shutil.rmtree(directory)


def test_a_fault_brings_its_page_and_those_beside_it(scene: Scene) -> None:
    assert scene.target.ask("r 50") == "50"
    for page in range(51, 51 + CHUNK_PAGES // 2):
        assert scene.target.ask(f"r {page}") == str(page)
    # Who waited is woken before the others come.
    wait_for(lambda: scene.pager.statistics().snapshot <= PAGES - 1 - CHUNK_PAGES, "the pages beside it")
    assert scene.pager.statistics().faults.snapshot <= 2
    assert scene.target.ask("r 0") == "0"
    assert scene.target.ask(f"r {PAGES - 1}") == scene.target.ask(f"r {PAGES - 50}") == "5"
    scene.whole()


def test_every_page_comes_by_faults(scene: Scene) -> None:
    expected = int(scene.memory.view(np.uint64).reshape(PAGES, -1)[:, 0].sum())
    assert scene.target.ask("t").split()[1] == str(expected)
    wait_for(lambda: not scene.pager.statistics().snapshot, "all pages")
    statistics = scene.pager.statistics()
    # A row is waited for once.
    wanted = scene.pager.wanted_rows()
    assert 0 < wanted.size <= scene.store.rows.offsets.size
    assert np.unique(wanted).size == wanted.size
    assert statistics.faults.snapshot < PAGES // 4
    assert statistics.faults.damaged == 0
    scene.whole()


def test_what_was_brought_in_is_written_and_evicted_as_any_page(scene: Scene) -> None:
    scene.target.ask("w 20 77")
    wait_for(lambda: scene.pager.residency.where[20] == Where.RESIDENT, "the page")
    assert scene.pager.evict(PageSet.full(PAGES), Where.POOL) >= 1
    assert scene.target.ask("r 20") == "77"
    scene.again()
    assert scene.target.ask("r 20") == "77"
    assert scene.target.ask("r 600") == "600"
    scene.memory.view(np.uint64).reshape(PAGES, -1)[20, 0] = 77
    scene.whole()


def test_a_writer_is_not_overtaken_by_what_comes_ahead(scene: Scene) -> None:
    for page in range(0, 900, 3):
        scene.target.ask(f"w {page} {page + 1}")
        if page % 100 == 0:
            scene.pager.fetch(PageSet.from_runs(PAGES, np.array([[page, 50]])))
    words = scene.memory.view(np.uint64).reshape(PAGES, -1)
    words[0:900:3, 0] = np.arange(0, 900, 3) + 1
    scene.whole()


def test_a_chunk_that_was_altered_is_a_memory_error(scene: Scene) -> None:
    path = scene.disk / f"{name(1)}.snap"
    row = int(scene.pager.residency.locator[350]) >> 8
    content = bytearray(path.read_bytes())
    content[int(scene.store.rows.offsets[row]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedPageError, match=rf"{name(1)}.snap does not hold what was written"):
        scene.pager.fetch(PageSet.full(PAGES))
    assert scene.target.ask("r 20") == "20"
    scene.target.say("r 350")
    assert scene.target.ended() == -7
    assert isinstance(scene.pager.failure, DamagedPageError)


def test_release_brings_everything(scene: Scene) -> None:
    scene.pager.release()
    found = np.empty(PAGES * PAGE_SIZE, dtype=np.uint8)
    scene.guest.memory.read_into(0, found.data)
    assert np.array_equal(found, scene.memory)
