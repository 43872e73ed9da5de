"""Pages of a live process that go to stores and come back, by a fault, ahead of one, or to a successor."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import DamagedPageError, KernelError, RefusedError, StoreFullError
from outboard.linux import pidfd, proc, ptrace
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest
from outboard.vmm.listener import Listener
from tests.support.machine import transparent_huge_pages
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target
from tests.support.vmm_client import VmmClient

MIB = 4
PAGES = MIB << 8
SUM = PAGES * (PAGES - 1) // 2
"""What the target finds when it adds up its pages, each of which holds its number."""


class Scene:
    """A target under a pager, with a pool on tmpfs and a swap file on a disk."""

    def __init__(self, directory: Path, shm: Path, room: int = PAGES, kind: str = "memfd") -> None:
        self.target = Target(kind, MIB)
        self.guest = guest_of(self.target)
        self.journal = shm
        self.stores = {Where.POOL: FileStore(shm / "pool", room), Where.FILE: FileStore(directory / "swap", room)}
        self.pager = self.engage()

    def engage(self) -> Pager:
        """A pager over what the journal says: the first one, or a successor."""
        return Pager(self.guest, Residency(PAGES, self.journal), self.stores)

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.pager.close()
        self.guest.close()
        for store in self.stores.values():
            store.close()


@pytest.fixture
def shm() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture
def make(tmp_path: Path, shm: Path) -> Iterator[Callable[..., Scene]]:
    require("root")
    made: list[Scene] = []

    def scene(room: int = PAGES, kind: str = "memfd") -> Scene:
        made.append(Scene(tmp_path, shm, room, kind))
        return made[-1]

    yield scene
    for one in made:
        one.close()


@pytest.fixture
def scene(make: Callable[..., Scene]) -> Scene:
    return make()


def some(*runs: tuple[int, int]) -> PageSet:
    return PageSet.from_runs(PAGES, np.array(runs, dtype=np.int64))


ALL = PageSet.full(PAGES)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("to", [Where.POOL, Where.FILE])
def test_what_is_evicted_comes_back_by_a_fault(scene: Scene, to: Where) -> None:
    assert scene.pager.evict(ALL, to) == PAGES
    # Page 0 holds the number 0: a page of zeros goes nowhere.
    assert scene.pager.residency.count(to) == PAGES - 1
    assert scene.pager.residency.count(Where.ZERO) == 1
    assert len(scene.guest.memory.populated()) == 0
    assert scene.target.ask("r 7") == "7"
    assert scene.target.ask("w 8 88") == "written"
    assert len(scene.guest.memory.populated()) == 2
    assert scene.target.ask("t").split()[1] == str(SUM + 80)
    # Who touched the last page is woken a moment before that is counted.
    wait_for(lambda: scene.pager.statistics().faults.latencies.count >= PAGES)
    statistics = scene.pager.statistics()
    assert (statistics.resident, statistics.evicted, statistics.zeros) == (PAGES, PAGES, 1)
    assert statistics.faults.zero == 1
    assert (statistics.faults.pool, statistics.faults.file) == ((PAGES - 1, 0) if to is Where.POOL else (0, PAGES - 1))
    assert statistics.faults.latencies.count >= PAGES
    assert scene.stores[to].statistics().used == 0
    assert scene.pager.failure is None


def test_what_is_fetched_takes_no_fault(scene: Scene) -> None:
    scene.pager.evict(some((0, 100), (300, 50)), Where.POOL)
    scene.pager.evict(some((200, 50)), Where.FILE)
    assert scene.pager.fetch(ALL) == 199
    assert scene.pager.fetch(ALL) == 0
    assert scene.target.ask("t").split()[1] == str(SUM)
    assert scene.pager.statistics().faults.pool == 0
    assert scene.pager.statistics().fetched == 199


def test_evicting_what_is_away_or_nothing_is_nothing(scene: Scene) -> None:
    scene.pager.evict(some((0, 10)), Where.POOL)
    assert scene.pager.evict(some((0, 10)), Where.FILE) == 0
    assert scene.pager.evict(PageSet(PAGES), Where.FILE) == 0


@pytest.mark.parametrize("to", [Where.POOL, Where.FILE])
def test_no_update_of_a_writer_is_lost(scene: Scene, to: Where) -> None:
    scene.target.ask("g")
    chance = random.Random(5)
    until = time.monotonic() + 1.5
    went = came = 0
    while time.monotonic() < until:
        first = chance.randrange(PAGES - 64)
        went += scene.pager.evict(some((first, chance.randrange(1, 64))), to)
        if chance.random() < 0.2:
            came += scene.pager.fetch(some((first, 32)))
    bad, _, _ = scene.target.ask("s").partition(" of ")
    assert bad == "bad 0"
    assert went > 1000
    assert came > 10
    assert scene.pager.failure is None


def test_after_populating_nothing_faults(scene: Scene) -> None:
    scene.pager.evict(some((0, 500)), Where.POOL)
    scene.pager.populate(ALL)
    _, total, faults = scene.target.ask("t").split()
    # Page 0 was all zeros, and is entered when it is touched.
    assert (int(total), int(faults)) == (SUM, 1)


def test_a_full_store_leaves_the_guest_as_it_was(make: Callable[..., Scene]) -> None:
    scene = make(room=100)
    scene.target.ask("g")
    with pytest.raises(StoreFullError, match="room for 100 pages"):
        scene.pager.evict(ALL, Where.FILE)
    assert scene.target.ask("s").startswith("bad 0 of")
    assert scene.pager.evict(some((1, 50)), Where.FILE) == 50


@pytest.fixture
def large(make: Callable[..., Scene]) -> Iterator[Scene]:
    """A scene whose target has large pages."""
    with transparent_huge_pages():
        scene = make(kind="thp")
        assert scene.guest.memory.populated() == ALL
        yield scene


@contextlib.contextmanager
def held(scene: Scene, page: int) -> Iterator[None]:
    """Hold on to the memory of a page as DMA does, in a pipe that nobody reads."""
    reader, writer = os.pipe()
    ((_, fd),) = scene.guest.memory.files()
    with mmap.mmap(fd, MIB << 20) as mapped:
        window = ctypes.c_char.from_buffer(mapped, page * PAGE_SIZE)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(window), PAGE_SIZE)
        assert ctypes.CDLL(None, use_errno=True).vmsplice(writer, vector, 1, 0) == PAGE_SIZE
        del window
    try:
        yield
    finally:
        os.close(reader)
        os.close(writer)


def test_parts_of_large_pages_go_and_come_back(large: Scene) -> None:
    parts = PageSet.from_numbers(PAGES, np.flatnonzero(np.arange(PAGES) % 3))
    assert large.pager.evict(parts, Where.FILE) == len(parts)
    assert large.guest.memory.populated() == ALL - parts
    assert large.pager.evict(ALL, Where.POOL) == PAGES - len(parts)
    assert len(large.guest.memory.populated()) == 0
    assert large.target.ask("t").split()[1] == str(SUM)


def test_part_of_a_large_page_that_is_held_stays(large: Scene) -> None:
    with held(large, 100):
        assert large.pager.evict(some((50, 100), (600, 10)), Where.FILE) == 0
        assert large.pager.residency.count(Where.RESIDENT) == PAGES
        assert not large.stores[Where.FILE].taken.any()
        assert large.target.ask("r 120") == "120"
        assert large.target.ask("r 605") == "605"
    assert large.pager.evict(some((50, 100)), Where.FILE) == 100
    assert large.target.ask("t").split()[1] == str(SUM)


def spoil(scene: Scene, page: int) -> None:
    slot = int(scene.pager.residency.locator[page])
    with scene.stores[Where.FILE].path.open("r+b") as file:
        file.seek(slot * PAGE_SIZE + 5)
        file.write(b"\xff")


def test_a_damaged_page_is_a_memory_error_and_never_zeros(scene: Scene) -> None:
    require("poison")
    scene.pager.evict(ALL, Where.FILE)
    spoil(scene, 9)
    assert scene.target.ask("r 8") == "8"
    scene.target.say("r 9")
    assert scene.target.ended() == -signal.SIGBUS
    wait_for(lambda: isinstance(scene.pager.failure, DamagedPageError))
    assert "page 9 is not what was put" in str(scene.pager.failure)
    assert scene.pager.statistics().faults.damaged == 1


def test_fetching_brings_all_but_the_damaged(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.FILE)
    spoil(scene, 9)
    with pytest.raises(DamagedPageError, match="1 of 256 pages"):
        scene.pager.fetch(ALL)
    assert scene.pager.residency.pages_at(Where.FILE) == some((9, 1))
    with pytest.raises(DamagedPageError):
        scene.pager.release()
    assert scene.target.ask("r 10") == "10"


def test_a_successor_serves_what_has_waited(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.POOL)
    scene.pager.close()
    scene.target.say("r 50")
    assert scene.target.waits()
    scene.pager = scene.engage()
    assert scene.target.answer() == "50"
    assert scene.target.ask("t").split()[1] == str(SUM)


def test_released_memory_is_whole_and_the_processes_own(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.POOL)
    assert any("userfaultfd" in link for link in proc.descriptors(scene.target.pid).values())
    scene.pager.release()
    scene.pager.release()
    assert not any("userfaultfd" in link for link in proc.descriptors(scene.target.pid).values())
    assert scene.target.ask("t").split()[1] == str(SUM)


def their_uffd(scene: Scene) -> int:
    """A duplicate of the userfaultfd that the target itself keeps."""
    theirs = next(n for n, link in proc.descriptors(scene.target.pid).items() if "userfaultfd" in link)
    process = pidfd.open(scene.target.pid)
    try:
        return pidfd.getfd(process, theirs)
    finally:
        pidfd.close(process)


class TestJournal:
    """Every state that dying between two steps can leave, for a page that was on its way to the pool."""

    def dead(self, scene: Scene, page: int, where: Where, *, present: bool, protected: bool) -> None:
        """Leave ``page`` as somebody did who died: in the pool, and maybe still or again in the file."""
        scene.pager.evict(some((page, 1)), Where.POOL)
        if present:
            content = np.zeros(PAGE_SIZE, dtype=np.uint8)
            scene.stores[Where.POOL].fetch(scene.pager.residency.locator[[page]], content)
            scene.guest.memory.write(page, content.data)
        scene.pager.residency.where[page] = where
        scene.pager.close()
        if protected:
            with Userfaultfd(their_uffd(scene)) as uffd:
                uffd.write_protect(scene.target.at(page), PAGE_SIZE)

    @pytest.mark.parametrize(
        ("where", "present", "protected", "kept"),
        [
            (Where.RESIDENT, True, True, False),  # before the journal was written
            (Where.POOL, True, True, False),  # written, not punched
            (Where.POOL, False, False, True),  # gone
            (Where.POOL, True, False, False),  # entered again, journal not yet written
            (Where.RESIDENT, True, False, False),  # back, slot not given up
        ],
    )
    def test_the_page_is_found(self, scene: Scene, where: Where, present: bool, protected: bool, kept: bool) -> None:
        self.dead(scene, 30, where, present=present, protected=protected)
        scene.target.say("w 30 77")
        scene.pager = scene.engage()
        assert scene.target.answer() == "written"
        assert scene.target.ask("r 30") == "77"
        # Who waited is woken a moment before that is counted.
        wait_for(lambda: scene.pager.statistics().faults.pool == int(kept))
        assert scene.stores[Where.POOL].statistics().used == 0
        scene.pager.evict(ALL, Where.FILE)
        assert scene.target.ask("t").split()[1] == str(SUM + 47)

    def test_zeros_in_the_place_of_a_page_that_was_being_punched(self, scene: Scene) -> None:
        scene.pager.evict(some((30, 1)), Where.POOL)
        scene.guest.memory.write(30, memoryview(bytes(PAGE_SIZE)))
        scene.pager.residency.leaving[30] = 1
        scene.pager.close()
        with Userfaultfd(their_uffd(scene)) as uffd:
            uffd.write_protect(scene.target.at(30), PAGE_SIZE)
        scene.target.say("i 30 3")
        scene.pager = scene.engage()
        assert scene.target.answer() == "33"
        assert not scene.pager.residency.leaving.any()
        assert scene.target.ask("t").split()[1] == str(SUM + 3)

    def test_zeros_in_a_large_page_that_is_held_are_taken_for_nothing(self, large: Scene) -> None:
        page, content = np.array([100]), np.empty(PAGE_SIZE, dtype=np.uint8)
        _, digests = large.pager.read_and_look(large.pager.runs_of(page), content)
        locators = large.stores[Where.FILE].put(content, digests)
        large.pager.residency.leaving[page] = 1
        large.pager.residency.went(page, Where.FILE, locators)
        large.guest.memory.write(100, memoryview(bytes(PAGE_SIZE)))
        large.pager.close()
        with held(large, 100), pytest.raises(KernelError, match="somebody holds on to"):
            large.engage()
        large.pager = large.engage()
        assert large.target.ask("r 100") == "100"
        assert large.target.ask("t").split()[1] == str(SUM)


def test_a_forked_child_reads_what_is_away(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.POOL)
    assert scene.target.ask("c") == f"child {SUM}"
    scene.pager.evict(ALL, Where.FILE)
    assert scene.target.ask("c") == f"child {SUM}"
    assert scene.target.ask("t").split()[1] == str(SUM)


def test_memory_that_moves_is_followed(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.POOL)
    at = scene.target.ask("m")
    assert int(at, 16) != scene.target.start
    assert scene.target.ask("t").split()[1] == str(SUM)
    assert scene.pager.evict(some((5, 5)), Where.POOL) == 5
    assert scene.target.ask("t").split()[1] == str(SUM)


def test_memory_that_another_manager_holds_is_refused(tmp_path: Path) -> None:
    with Target(mebibytes=MIB) as target, guest_of(target) as guest:
        ours, theirs = ptrace.inject_userfaultfd(target.pid)
        ptrace.close_in_target(target.pid, theirs)
        with Userfaultfd(ours) as uffd:
            uffd.api(Features.MISSING_SHMEM)
            uffd.register(target.start, target.size, Mode.MISSING)
            before = proc.descriptors(target.pid)
            with pytest.raises(RefusedError, match="another userfaultfd") as caught:
                Pager(guest, Residency(PAGES, tmp_path), {})
            assert caught.value.reason == "uffd-taken"
            assert proc.descriptors(target.pid) == before


def test_large_pages_are_refused(tmp_path: Path) -> None:
    with Target(mebibytes=MIB) as target, guest_of(target) as guest:
        large = Guest("web", guest.pid, (dataclasses.replace(guest.regions[0], page_size=2 << 20),))
        with large, pytest.raises(RefusedError, match="2 MiB") as caught:
            Pager(large, Residency(PAGES, tmp_path), {})
        assert caught.value.reason == "large-pages"


def test_a_guest_that_was_handed_over_is_managed_as_it_is(tmp_path: Path, shm: Path) -> None:
    require("root")
    path = tmp_path / "uffd.sock"
    with VmmClient() as client, Listener(path) as listener:
        client.register(Mode.MISSING | Mode.WP)
        client.hand_over(path, mode="MISSING|WP")
        attachment = listener.accept(10)
        assert attachment is not None
        with attachment:
            guest = attachment.guest
            clamp = Clamp.handed_over(guest, attachment.uffd, attachment.mode)
            stores = {Where.POOL: FileStore(shm / "pool", guest.pages)}
            pager = Pager(guest, Residency(guest.pages, shm), stores, clamp)
            attachment.acknowledge()
            assert client.answer_within(2000) == "answer 1"
            for page in range(200):
                assert client.ask(f"w {page} {page + 5}") == "written"
            # A page whose fault is being answered this very moment stays.
            while pager.statistics().resident:
                pager.evict(PageSet.full(guest.pages), Where.POOL)
            assert pager.statistics().evicted == guest.pages
            assert client.ask("r 100") == "105"
            assert client.touch() == f"touched {sum(range(5, 205))}"
            wait_for(lambda: pager.statistics().faults.pool == 200)
            pager.evict(PageSet.full(guest.pages), Where.POOL)
            pager.populate(PageSet.full(guest.pages))
            pager.release()
            assert client.touch() == f"touched {sum(range(5, 205))}"
        stores[Where.POOL].close()


@pytest.mark.parametrize(
    ("kind", "mode", "reason"),
    [("memfd", "MISSING", "no-write-protection"), ("anon", "MISSING|WP", "anonymous-memory")],
)
def test_a_guest_that_was_handed_over_and_cannot_be_evicted_from(
    tmp_path: Path, kind: str, mode: str, reason: str
) -> None:
    require("root")
    path = tmp_path / "uffd.sock"
    with VmmClient(kind) as client, Listener(path) as listener:
        client.register(Mode.MISSING | Mode.WP if "WP" in mode else Mode.MISSING)
        client.hand_over(path, mode=mode)
        attachment = listener.accept(10)
        assert attachment is not None
        with attachment:
            clamp = Clamp.handed_over(attachment.guest, attachment.uffd, attachment.mode)
            with pytest.raises(RefusedError) as caught:
                Pager(attachment.guest, Residency(attachment.guest.pages, tmp_path), {}, clamp)
            assert caught.value.reason == reason


def test_a_process_that_ends_is_an_error_to_evict_from(scene: Scene) -> None:
    scene.target.say("q")
    assert scene.target.ended() == 0
    with pytest.raises(KernelError, match="No such process"):
        scene.pager.evict(ALL, Where.POOL)
