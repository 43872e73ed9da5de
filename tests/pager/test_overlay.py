"""Pages of a live process that it shares with others, copies when it writes, and gets back whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import memfd, proc
from outboard.linux.hand import Hand
from outboard.pager import mappings
from outboard.pager.mappings import overlaid
from outboard.pager.overlay import Overlay
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 4
PAGES = MIB << 8
SUM = PAGES * (PAGES - 1) // 2
ALL = PageSet.full(PAGES)


class Scene:
    """A target under a pager, and a pool that holds what its pages hold: slot n the content of page n."""

    def __init__(self, shm: Path, pool: int) -> None:
        self.target = Target(mebibytes=MIB)
        self.guest = guest_of(self.target)
        self.journal = shm
        self.pool = pool
        self.stores = {Where.POOL: FileStore(shm / f"pool-{self.target.pid}", PAGES)}
        content = bytearray(PAGES * PAGE_SIZE)
        self.guest.memory.read_into(0, memoryview(content))
        assert os.pwrite(pool, content, 0) == len(content)
        self.residency = Residency(PAGES)
        self.pager = self.engage()

    def engage(self) -> Pager:
        return Pager(self.guest, self.residency, self.stores)

    @property
    def overlay(self) -> Overlay:
        return self.pager.share_from(self.pool)

    def mapped(self) -> set[str]:
        """The files that the target's memory is mapped from."""
        end = self.target.start + self.target.size
        return {one.path for one in proc.maps(self.target.pid) if self.target.start <= one.start < end}

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.pager.close()
        self.guest.close()
        for store in self.stores.values():
            store.close()


@pytest.fixture
def pool() -> Iterator[int]:
    fd = memfd.create("test-pool", PAGES * PAGE_SIZE)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def scene(pool: int) -> Iterator[Scene]:
    require("root")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = Scene(directory, pool)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def spans(*rows: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(rows, dtype=np.int64)


WHOLE = spans((0, 0, PAGES))


def some(*runs: tuple[int, int]) -> PageSet:
    return PageSet.from_runs(PAGES, np.array(runs, dtype=np.int64))


def test_shared_pages_read_as_before_and_take_no_memory(scene: Scene) -> None:
    before = len(proc.maps(scene.target.pid))
    done = scene.overlay.share(WHOLE)
    # The first page of a region stays.
    assert done == ALL - some((0, 1))
    assert len(scene.guest.memory.populated()) == 1
    assert overlaid(scene.guest) == done
    assert len(proc.maps(scene.target.pid)) <= before + 3
    assert scene.target.ask("t").split()[1] == str(SUM)
    assert scene.pager.statistics().shared == PAGES - 1
    assert not scene.overlay.copied()
    assert scene.pager.failure is None


def test_a_write_is_the_writer_s_alone_and_comes_back(scene: Scene) -> None:
    scene.overlay.share(WHOLE)
    assert scene.target.ask("w 7 1007") == "written"
    assert scene.overlay.copied() == some((7, 1))
    assert os.pread(scene.pool, 8, 7 * PAGE_SIZE) == (7).to_bytes(8, "little")
    content = scene.overlay.read(np.array([6, 7, 8])).view(np.uint64).reshape(3, -1)[:, 0]
    assert content.tolist() == [6, 1007, 8]
    assert scene.overlay.unshare(some((6, 2))) == 2
    assert scene.residency.pages_at(Where.RESIDENT) == some((0, 1), (6, 2))
    assert overlaid(scene.guest) == ALL - some((0, 1), (6, 2))
    assert scene.target.ask("r 7") == "1007"
    assert scene.target.ask("w 6 1006") == "written"
    page = bytearray(PAGE_SIZE)
    scene.guest.memory.read_into(6, memoryview(page))
    assert int.from_bytes(page[:8], "little") == 1006


def test_everything_is_undone_at_release(scene: Scene) -> None:
    before, files = len(proc.maps(scene.target.pid)), scene.mapped()
    descriptors = sorted(proc.descriptors(scene.target.pid).values())
    scene.overlay.share(spans(*((page, page, 1) for page in range(1, PAGES, 2))))
    assert len(proc.maps(scene.target.pid)) > before + PAGES - 8
    assert scene.target.ask("w 9 1009") == "written"
    scene.pager.release()
    assert scene.mapped() == files
    assert len(proc.maps(scene.target.pid)) == before
    assert [thread.name for thread in proc.threads(scene.target.pid)] == ["target"]
    left = sorted(proc.descriptors(scene.target.pid).values())
    assert [one for one in left if "userfaultfd" not in one] == [one for one in descriptors if "userfaultfd" not in one]
    assert scene.target.ask("t").split()[1] == str(SUM + 1000)


def test_a_page_that_differs_is_left_alone(scene: Scene) -> None:
    scene.target.ask("w 3 33")
    os.pwrite(scene.pool, b"x", 5 * PAGE_SIZE + 4095)
    done = scene.overlay.share(WHOLE)
    assert done == ALL - some((0, 1), (3, 1), (5, 1))
    assert scene.overlay.statistics().differed == 2
    assert scene.target.ask("t").split()[1] == str(SUM + 30)
    assert scene.target.ask("w 5 55") == "written"


def test_slots_need_not_follow_pages_and_mappings_are_limited(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for page, slot in ((10, 700), (11, 20)):
        os.pwrite(scene.pool, page.to_bytes(8, "little"), slot * PAGE_SIZE)
        os.pwrite(scene.pool, bytes(PAGE_SIZE - 8), slot * PAGE_SIZE + 8)
    limit = Path(tempfile.mkdtemp()) / "max_map_count"
    now = len(proc.maps(scene.target.pid))
    # The hand's own, and the one that pages are mapped back from.
    limit.write_text(str(4096 + now + 2 + 4))
    monkeypatch.setattr(mappings, "MAX_MAP_COUNT", limit)
    assert scene.overlay.share(spans((10, 700, 1), (11, 20, 1), (30, 30, 1))) == some((10, 2))
    shutil.rmtree(limit.parent)
    assert scene.target.ask("t").split()[1] == str(SUM)
    assert scene.residency.locator[10:12].tolist() == [700, 20]


def test_writers_lose_nothing_while_pages_come_and_go(scene: Scene) -> None:
    scene.target.ask("p 100")
    scene.target.ask("g")
    shared = copied = 0
    for _ in range(30):
        content = bytearray(PAGES * PAGE_SIZE)
        scene.guest.memory.read_into(0, memoryview(content))
        for first, count in scene.residency.pages_at(Where.RESIDENT):
            os.pwrite(scene.pool, content[first * PAGE_SIZE : (first + count) * PAGE_SIZE], first * PAGE_SIZE)
        shared += len(scene.overlay.share(WHOLE))
        scene.overlay.zap(scene.overlay.shared())
        copied += len(scene.overlay.copied())
        scene.overlay.unshare(ALL)
    assert scene.target.ask("s").startswith("bad 0 of ")
    assert (shared > PAGES, copied > 0) == (True, True)
    assert scene.pager.failure is None
    scene.overlay.share(WHOLE)
    scene.pager.release()
    assert scene.target.ask("t").split()[1] == str(SUM)


def test_reads_show_after_a_zap(scene: Scene) -> None:
    scene.overlay.share(WHOLE)
    scene.target.ask("t")
    scene.target.ask("w 4 44")
    zapped = scene.overlay.zap(ALL)
    assert zapped == ALL - some((0, 1), (4, 1))
    assert not scene.overlay.touched(zapped)
    scene.target.ask("r 9")
    assert scene.target.ask("r 4") == "44"
    assert scene.overlay.touched(zapped) == some((9, 1))


def test_pages_of_zeros_go_without_a_copy(scene: Scene) -> None:
    scene.target.ask("w 5 0")
    assert scene.overlay.drop_zeros(some((4, 2))) == 1
    assert scene.residency.where[5] == Where.ZERO
    assert 5 not in scene.guest.memory.populated()
    assert scene.target.ask("w 4 44") == "written"
    assert scene.target.ask("r 5") == "0"
    assert scene.target.ask("w 5 55") == "written"


def test_a_successor_goes_on(scene: Scene) -> None:
    scene.overlay.share(spans((100, 100, 200)))
    scene.target.ask("w 150 0")
    scene.pager.close()
    assert [thread.name for thread in proc.threads(scene.target.pid)] == ["target"]
    # As if the engine had died between two steps: the journal is ahead of the mappings, or behind the file.
    scene.residency.where[400] = Where.SHARED
    scene.guest.memory.write(120, memoryview(bytes(PAGE_SIZE)))
    scene.pager = scene.engage()
    assert scene.residency.pages_at(Where.SHARED) == some((100, 200))
    with pytest.raises(RefusedError, match="whose pool is not open"):
        scene.pager.release()
    assert scene.target.ask("t").split()[1] == str(SUM - 150)
    assert scene.overlay.unshare(ALL) == 200
    assert scene.target.ask("t").split()[1] == str(SUM - 150)


def test_what_could_not_be_mapped_is_as_it_was(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Hand.batch

    def refuse(hand: Hand, calls: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> object:
        # Page 20 and what follows cannot be mapped: its address is none.
        calls = calls.copy()
        calls[calls[:, 1] == scene.target.at(20), 1] = 1
        return batch(hand, calls)

    overlay = scene.overlay
    monkeypatch.setattr(Hand, "batch", refuse)
    with pytest.raises(KernelError, match="mmap"):
        overlay.share(spans((10, 10, 2), (20, 20, 3)))
    assert scene.residency.pages_at(Where.SHARED) == some((10, 2))
    assert scene.target.ask("w 20 2000") == "written"
    assert scene.target.ask("w 10 1000") == "written"
    monkeypatch.undo()
    assert scene.overlay.unshare(ALL) == 2
    assert scene.target.ask("t").split()[1] == str(SUM + 1980 + 990)


def test_a_pool_on_a_disk_is_refused(scene: Scene, tmp_path: Path) -> None:
    with (tmp_path / "pool").open("w+b") as file, pytest.raises(RefusedError, match="tmpfs"):
        scene.pager.share_from(file.fileno())
    assert [thread.name for thread in proc.threads(scene.target.pid)] == ["target"]


def test_a_guest_that_has_forked_is_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pager, "spaces", 2)
    with pytest.raises(RefusedError, match="forked"):
        scene.overlay.share(WHOLE)
