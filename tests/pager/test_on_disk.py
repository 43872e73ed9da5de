"""Pages that a disk of the guest's holds: dropped, brought back, replaced, and never believed."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import DamagedPageError, RefusedError
from outboard.linux import pidfd, proc, ptrace
from outboard.linux.userfaultfd import UFFDIO_POISON, Userfaultfd
from outboard.pager.known import Known
from outboard.pager.on_disk import OnDisk
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.spec import Disk
from tests.support.cluster import wait_for
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 4
PAGES = MIB << 8
SUM = PAGES * (PAGES - 1) // 2
HELD = range(300, 500)
"""The pages that the disk holds, from its block 7 on."""
ALL = PageSet.full(PAGES)


class Scene:
    """A target whose pages hold their numbers, and a disk that holds some of them."""

    def __init__(self, directory: Path, journal: Path) -> None:
        self.target = Target(mebibytes=MIB)
        self.guest = guest_of(self.target)
        self.directory, self.journal = directory, journal
        content = bytearray(len(HELD) * PAGE_SIZE)
        self.guest.memory.read_into(HELD.start, memoryview(content))
        self.image = directory / "image"
        self.image.write_bytes(bytes(7 * PAGE_SIZE) + content)
        self.disks = [Disk(path=str(self.image), read_only=True)]
        self.stores = {Where.FILE: FileStore(directory / "swap", PAGES)}
        self.engage()

    def engage(self) -> None:
        self.on_disk = OnDisk(self.disks, self.directory / "indexes", self.journal, PAGES)
        self.on_disk.await_indexes()
        self.pager = Pager(self.guest, Residency(PAGES, self.journal), self.stores, on_disk=self.on_disk)
        self.known = Known(self.pager, self.on_disk)

    def disengage(self) -> None:
        self.pager.close()
        self.on_disk.close()

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.disengage()
        self.guest.close()
        for store in self.stores.values():
            store.close()

    def spoil(self, page: int) -> None:
        # As somebody does who does not ask the kernel: the lease would hold up an open for writing.
        self.on_disk.give_up(0)
        with self.image.open("r+b") as file:
            file.seek((page - HELD.start + 7) * PAGE_SIZE + 9)
            file.write(b"?")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    require("root")
    shm = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = Scene(tmp_path, shm)
    yield made
    made.close()
    shutil.rmtree(shm)


def test_what_a_disk_holds_is_dropped_and_read_from_there(scene: Scene) -> None:
    assert scene.pager.evict(ALL, Where.FILE) == PAGES
    assert scene.pager.residency.pages_at(Where.DISK).numbers().tolist() == list(HELD)
    assert scene.stores[Where.FILE].statistics().used == PAGES - 1 - len(HELD)
    assert scene.target.ask(f"r {HELD.start}") == str(HELD.start)
    assert scene.target.ask(f"w {HELD.start + 1} 5") == "written"
    # Who touched a page is woken a moment before that is counted.
    wait_for(lambda: scene.pager.statistics().faults.disk == 2, "the count of the faults")
    assert scene.pager.statistics().disk == len(HELD) - 2
    assert scene.pager.fetch(PageSet.from_numbers(PAGES, np.arange(400, 600))) == 200
    scene.pager.evict(ALL, Where.FILE)
    assert not scene.pager.residency.pages_at(Where.DISK).mask()[HELD.start + 1]
    assert scene.target.ask("t").split()[1] == str(SUM - HELD.start - 1 + 5)
    # Who touched the last page is woken a moment before its slot is given up.
    wait_for(lambda: scene.stores[Where.FILE].statistics().used == 0, "empty slots")
    assert scene.pager.failure is None


def test_no_update_of_a_writer_is_lost(scene: Scene) -> None:
    scene.target.ask("g")
    for _ in range(60):
        scene.pager.evict(ALL, Where.FILE)
        scene.known.learn(ALL)
    assert scene.target.ask("s").startswith("bad 0 of")
    assert scene.pager.failure is None


def test_a_successor_knows_which_image_a_number_means(scene: Scene) -> None:
    scene.pager.evict(ALL, Where.FILE)
    scene.disengage()
    other = scene.directory / "other"
    other.write_bytes(bytes(PAGE_SIZE))
    scene.target.say(f"r {HELD.start + 5}")
    assert scene.target.waits()
    # Another disk first, and the one that holds the pages is the VM's no more.
    scene.disks = [Disk(path=str(other), read_only=True)]
    scene.engage()
    assert scene.target.answer() == str(HELD.start + 5)
    assert scene.target.ask("t").split()[1] == str(SUM)
    wait_for(lambda: scene.pager.statistics().faults.disk == len(HELD), "the count of the faults")


def test_an_image_that_is_no_longer_there_is_a_memory_error_and_never_zeros(scene: Scene) -> None:
    require("poison")
    scene.pager.evict(ALL, Where.FILE)
    scene.disengage()
    scene.image.unlink()
    scene.engage()
    assert scene.target.ask("r 8") == "8"
    scene.target.say(f"r {HELD.start}")
    assert scene.target.ended() == -signal.SIGBUS


def test_a_block_that_was_overwritten_is_a_memory_error(scene: Scene) -> None:
    require("poison")
    scene.pager.evict(ALL, Where.FILE)
    scene.spoil(HELD.start + 3)
    with pytest.raises(DamagedPageError, match="1 of 200 blocks"):
        scene.pager.fetch(ALL)
    assert scene.pager.residency.pages_at(Where.DISK).numbers().tolist() == [HELD.start + 3]
    scene.target.say(f"r {HELD.start + 3}")
    assert scene.target.ended() == -signal.SIGBUS


def test_an_image_that_somebody_has_open_for_writing_holds_nothing(scene: Scene) -> None:
    scene.disengage()
    writer = os.open(scene.image, os.O_RDWR)
    scene.engage()
    scene.pager.evict(ALL, Where.FILE)
    assert scene.pager.residency.count(Where.DISK) == 0
    os.close(writer)
    scene.pager.fetch(ALL)


def test_whoever_wants_to_write_to_an_image_is_noticed(scene: Scene) -> None:
    assert scene.on_disk.disturbed() == []
    with pytest.raises(BlockingIOError):
        os.open(scene.image, os.O_RDWR | os.O_NONBLOCK)
    assert scene.on_disk.disturbed() == [0]
    scene.on_disk.give_up(0)
    assert scene.on_disk.disturbed() == []
    scene.pager.evict(ALL, Where.FILE)
    assert scene.pager.residency.count(Where.DISK) == 0
    os.close(os.open(scene.image, os.O_RDWR | os.O_NONBLOCK))


def break_memory(scene: Scene, page: int) -> None:
    """Do what a memory error does: the content is gone, and who touches the page gets SIGBUS."""
    process = pidfd.open(scene.target.pid)
    theirs = next(n for n, link in proc.descriptors(scene.target.pid).items() if "userfaultfd" in link)
    address = scene.target.at(page)
    scene.guest.memory.punch(page, 1)
    with ptrace.Stopped(scene.target.pid) as target:
        target.syscall("madvise(DONTNEED)", 28, address, PAGE_SIZE, mmap.MADV_DONTNEED)
    with Userfaultfd(pidfd.getfd(process, theirs)) as uffd:
        uffd.write_protect(address, PAGE_SIZE, protect=False)
        room = (ctypes.c_int64 * 4)(address, PAGE_SIZE, 0, 0)
        fcntl.ioctl(uffd.fileno(), UFFDIO_POISON.number, room)
    pidfd.close(process)


def test_a_page_whose_memory_fails_is_replaced_while_the_guest_runs(scene: Scene) -> None:
    require("poison")
    assert scene.known.learn(ALL) == len(HELD)
    page = HELD.start + 20
    break_memory(scene, page)
    scene.known.replace(page)
    assert scene.target.ask(f"r {page}") == str(page)
    assert scene.target.ask(f"w {page} 77") == "written"
    assert scene.target.ask("t").split()[1] == str(SUM - page + 77)


def test_without_the_replacement_it_is_a_memory_error(scene: Scene) -> None:
    require("poison")
    scene.known.learn(ALL)
    break_memory(scene, HELD.start)
    scene.target.say(f"r {HELD.start}")
    assert scene.target.ended() == -signal.SIGBUS


def test_a_page_that_no_disk_holds_as_it_was_last_is_reported(scene: Scene) -> None:
    scene.known.learn(ALL)
    page = HELD.start + 1
    assert scene.target.ask(f"w {page} 9") == "written"
    for refused in (page, 5, PAGES, -1):
        with pytest.raises(RefusedError) as caught:
            scene.known.replace(refused)
        assert caught.value.reason == ("not-on-disk" if refused in (page, 5) else "no-such-page")
    assert scene.target.ask(f"r {page}") == "9"
    assert scene.on_disk.known.sum() == len(HELD) - 1


def test_what_was_known_is_forgotten_when_it_moves(scene: Scene) -> None:
    scene.known.learn(ALL)
    scene.pager.evict(PageSet.from_numbers(PAGES, np.array([HELD.start])), Where.FILE)
    assert not scene.on_disk.known[HELD.start]
    assert scene.target.ask(f"w {HELD.start} 4") == "written"
    with pytest.raises(RefusedError, match="not known to lie on any"):
        scene.known.replace(HELD.start)


def test_a_replacement_from_a_disk_that_has_changed_is_refused(scene: Scene) -> None:
    scene.known.learn(ALL)
    scene.spoil(HELD.start + 2)
    with pytest.raises(DamagedPageError):
        scene.known.replace(HELD.start + 2)
    assert scene.target.ask(f"r {HELD.start + 2}") == str(HELD.start + 2)
