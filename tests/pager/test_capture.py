"""An image of a live process's memory is that of one instant, whoever writes meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError
from outboard.linux import pidfd, proc, process_madvise
from outboard.linux.process_madvise import Advice
from outboard.pager.capture import Capture, Saved
from outboard.pager.pager import Pager
from outboard.pager.saving import Word
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 8
PAGES = MIB << 8
STRIDE = 7919
"""Of the target's writer in order."""


class Scene:
    """A target under a pager, and a place for pages to spill."""

    def __init__(self, directory: Path, disk: Path, kind: str = "memfd") -> None:
        self.target = Target(kind, mebibytes=MIB)
        self.guest = guest_of(self.target)
        self.directory = directory
        self.stores = {
            Where.POOL: FileStore(directory / "pool", PAGES),
            Where.FILE: FileStore(disk / "swap", PAGES),
        }
        self.pager = self.engage()
        self.spill = os.open(directory, os.O_TMPFILE | os.O_RDWR)

    def engage(self) -> Pager:
        return Pager(self.guest, Residency(PAGES, self.directory), self.stores)

    def memory(self) -> NDArray[np.uint8]:
        """All of it, as a guest that stands still has it."""
        found = np.empty(PAGES * PAGE_SIZE, dtype=np.uint8)
        self.guest.memory.read_into(0, found.data)
        for where, store in self.stores.items():
            for page in np.flatnonzero(self.pager.residency.where == where).tolist():
                part = found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                store.fetch(self.pager.residency.locator[page : page + 1], part)
        return found

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        os.kill(self.target.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: states(self.target.pid) == {"T"})
            yield
        finally:
            os.kill(self.target.pid, signal.SIGCONT)

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.pager.close()
        self.guest.close()
        os.close(self.spill)
        for store in self.stores.values():
            store.close()


def states(pid: int) -> set[str]:
    """Of its threads."""
    found = (path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return {text.rpartition(")")[2].split()[0] for text in found}


def has_saved(capture: Capture) -> bool:
    return int(capture.saving.state[Word.RECORDS]) > 0


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    require("root", "no-swap")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made: list[Scene] = []

    def scene(kind: str = "memfd") -> Scene:
        made.append(Scene(directory, tmp_path, kind))
        return made[-1]

    yield scene
    for one in made:
        one.close()
    shutil.rmtree(directory)


@pytest.fixture
def scene(make: Callable[..., Scene]) -> Scene:
    return make()


class Image:
    """What a capture hands out, each page once."""

    def __init__(self) -> None:
        self.content: NDArray[np.uint8] = np.zeros((PAGES, PAGE_SIZE), dtype=np.uint8)
        self.seen: NDArray[np.int64] = np.zeros(PAGES, dtype=np.int64)
        self.by_faults = 0

    def take(self, saved: Saved) -> None:
        numbers, content, zero = saved
        self.content[numbers] = content.reshape(-1, PAGE_SIZE)
        self.seen[numbers] += 1
        assert not content.reshape(-1, PAGE_SIZE)[zero].any()

    def complete(self, capture: Capture) -> None:
        while not capture.complete:
            for saved in capture.from_faults():
                self.by_faults += saved[0].size
                self.take(saved)
            for saved in capture.sweep():
                self.take(saved)
        assert (self.seen == 1).all()


def test_it_equals_the_memory_of_a_guest_that_stands_still(make: Callable[..., Scene]) -> None:
    for kind in ("memfd", "thp"):
        scene = make(kind)
        pager = scene.pager
        pager.evict(PageSet.from_runs(PAGES, np.array([[100, 200]])), Where.POOL)
        pager.evict(PageSet.from_runs(PAGES, np.array([[400, 300]])), Where.FILE)
        scene.guest.memory.punch(900, 50)
        scene.target.ask("g")
        for _ in range(3):
            image = Image()
            capture = pager.capture(scene.spill)
            with scene.standing_still():
                capture.take()
                before = scene.memory()
            image.complete(capture)
            pager.end_capture(capture)
            assert np.array_equal(image.content.reshape(-1), before)
        assert scene.target.ask("s").startswith("bad 0 of ")
        assert pager.failure is None


def test_it_is_of_one_instant(scene: Scene) -> None:
    for _ in range(4):
        scene.target.ask("n")
        image = Image()
        capture = scene.pager.capture(scene.spill)
        with scene.standing_still():
            capture.take()
        wait_for(partial(has_saved, capture))
        image.complete(capture)
        scene.pager.end_capture(capture)
        scene.target.ask("e")
        numbers = image.content[:, 8:16].copy().view(np.uint64).reshape(-1).astype(np.int64)
        last = int(numbers.max())
        # Each page has the last number that was its own before the instant: none is from before, none from after.
        written = np.arange(max(1, last - PAGES + 1), last + 1)
        assert np.array_equal(numbers[written * STRIDE % PAGES], written)
        assert image.by_faults > 0


def test_pages_that_do_not_fit_in_memory_wait_in_the_file(scene: Scene) -> None:
    image = Image()
    capture = scene.pager.capture(scene.spill, ring=16)
    capture.take()
    before = scene.memory()
    for page in range(200):
        scene.target.ask(f"w {page} 7")
    assert capture.saving.state[Word.SPILLED] == 200 - 16
    assert os.fstat(scene.spill).st_size == 184 * PAGE_SIZE
    image.complete(capture)
    scene.pager.end_capture(capture)
    assert image.by_faults == 200
    assert np.array_equal(image.content.reshape(-1), before)


def test_what_is_written_before_the_instant_is_in_it(scene: Scene) -> None:
    capture = scene.pager.capture(scene.spill)
    scene.pager.evict(PageSet.from_runs(PAGES, np.array([[50, 10]])), Where.POOL)
    for page in (5, 55, 500):
        scene.target.ask(f"w {page} 1234567")
    capture.take()
    for page in (5, 6, 55, 500):
        scene.target.ask(f"w {page} 1")
    image = Image()
    image.complete(capture)
    scene.pager.end_capture(capture)
    words = image.content[:, :8].copy().view(np.uint64).reshape(-1)
    assert words[[5, 6, 55, 500]].tolist() == [1234567, 6, 1234567, 1234567]
    assert image.by_faults == 4


def test_pages_that_are_not_mapped_are_saved_before_they_change(scene: Scene) -> None:
    process = pidfd.open(scene.target.pid)
    for when in ("before", "armed", "after"):
        capture = scene.pager.capture(scene.spill) if when != "before" else None
        if when != "after":
            process_madvise.advise(process, [(scene.target.start, scene.target.size)], Advice.PAGEOUT)
        capture = capture or scene.pager.capture(scene.spill)
        capture.take()
        before = scene.memory()
        if when == "after":
            process_madvise.advise(process, [(scene.target.start, scene.target.size)], Advice.PAGEOUT)
        for page in range(0, PAGES, 7):
            scene.target.ask(f"w {page} {ord(when[0])}")
        image = Image()
        image.complete(capture)
        scene.pager.end_capture(capture)
        assert np.array_equal(image.content.reshape(-1), before), when
    pidfd.close(process)


def test_an_image_that_cannot_be_kept_is_lost_and_the_guest_goes_on(scene: Scene) -> None:
    read_only = os.open("/dev/null", os.O_RDONLY)
    capture = scene.pager.capture(read_only, ring=4)
    capture.take()
    for page in range(5):
        assert scene.target.ask(f"w {page} 9") == "written"
    with pytest.raises(KernelError, match="saving of a page of the image"):
        for _ in capture.from_faults():
            pass
    scene.pager.end_capture(capture)
    assert scene.target.ask("g") == "going"
    assert scene.target.ask("s").startswith("bad 0 of ")
    assert scene.pager.failure is None
    os.close(read_only)


def test_a_page_that_its_store_has_lost_ends_it(scene: Scene) -> None:
    scene.pager.evict(PageSet.from_runs(PAGES, np.array([[100, 1]])), Where.FILE)
    store = scene.stores[Where.FILE]
    assert store.digests is not None
    store.digests[:] ^= np.uint64(1)
    capture = scene.pager.capture(scene.spill)
    capture.take()
    with pytest.raises(DamagedPageError):
        for _ in capture.sweep():
            pass
    scene.pager.end_capture(capture)
    store.digests[:] ^= np.uint64(1)
    assert scene.target.ask("r 100") == "100"


@pytest.mark.parametrize("taken", [False, True])
def test_a_manager_that_goes_leaves_nobody_waiting_for_its_successor(scene: Scene, taken: bool) -> None:
    capture = scene.pager.capture(scene.spill)
    if taken:
        capture.take()
    scene.pager.close()
    scene.target.say("w 3 77")
    assert scene.target.waits()
    scene.pager = scene.engage()
    assert scene.target.answer() == "written"
    assert scene.target.ask("g") == "going"
    assert scene.target.ask("s").startswith("bad 0 of ")
    assert scene.pager.statistics().faults.protected <= 1


def test_who_serves_faults_goes_ahead_of_others_whoever_started_it(scene: Scene) -> None:
    require("root")
    capture = scene.pager.capture(scene.spill)
    scene.pager.end_capture(capture)
    deadline = time.monotonic() + 20
    while True:
        servers = [one.tid for one in proc.threads(os.getpid()) if one.name == "outboard-faults"]
        if [os.getpriority(os.PRIO_PROCESS, tid) for tid in servers] == [-15]:
            return
        assert time.monotonic() < deadline
        time.sleep(0.001)
