"""The engine of a managed guest: its lock, its orders, its end; and what people are told."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from outboard.agent.holding import CONTROL, hold
from outboard.agent.manager import Manager
from outboard.agent.orders import Evict, Fetch, HandOver, Learn, Look, Recover, Release, ask
from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError, UnreachableError
from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_process
from outboard.vmm.spec import Disk
from tests.support.cluster import wait_for
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def target() -> Iterator[Target]:
    require("root", "no-swap")
    with Target(mebibytes=4) as made:
        yield made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "memory"


class Engine:
    """A manager in a thread."""

    def __init__(self, directory: Path, pid: int, *, successor: bool = False, disks: Sequence[Disk] = ()) -> None:
        self.control = directory / CONTROL
        swap, indexes = directory.parent / "swap" / "target", directory.parent / "blocks"
        self._manager = Manager(directory, partial(attach_process, pid), swap, disks, indexes, successor=successor)
        self._thread = threading.Thread(target=self._manager.serve)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_orders_are_carried_out_and_answered(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    looked = ask(engine.control, Look())
    assert (looked.vm, looked.engine, looked.memory) == ("target", os.getpid(), target.size)
    assert (looked.resident, looked.moved, looked.faults) == (target.size, 0, 0)
    assert ask(engine.control, Evict(to="pool", most=1 << 20, idle=0.0)).moved == 1 << 20
    looked = ask(engine.control, Evict(to="file", idle=0.0))
    assert looked.moved == 3 << 20
    # Page 0 holds the number 0.
    assert (looked.zero, looked.pool, looked.file) == (4096, (1 << 20) - 4096, 3 << 20)
    assert target.ask("r 900") == "900"
    # Who waited is woken a moment before that is counted.
    wait_for(lambda: ask(engine.control, Look()).faults == 1, "the fault in the account")
    looked = ask(engine.control, Look())
    assert looked.fault_p50_us is not None
    assert ask(engine.control, Fetch()).moved == (4 << 20) - 8192
    assert ask(engine.control, Release()).resident >= (4 << 20) - 4096
    engine.join()
    assert not directory.exists()
    assert not list((directory.parent / "swap").iterdir())
    assert target.ask("t").startswith("touched ")


def held_on_disk(target: Target, path: Path) -> Disk:
    """A disk that holds the target's pages 100 to 199."""
    content = bytearray(100 * PAGE_SIZE)
    with guest_of(target) as guest:
        guest.memory.read_into(100, memoryview(content))
    path.write_bytes(content)
    return Disk(path=str(path), read_only=True)


def test_what_a_disk_holds_is_dropped_known_and_put_back(target: Target, directory: Path, tmp_path: Path) -> None:
    engine = Engine(directory, target.pid, disks=[held_on_disk(target, tmp_path / "image")])
    assert ask(engine.control, Learn()).moved == 100 * PAGE_SIZE
    ask(engine.control, Recover(150))
    assert target.ask("w 151 3") == "written"
    for page, why in ((151, "not known to lie"), (1 << 40, "has pages 0 to")):
        with pytest.raises(RefusedError, match=why):
            ask(engine.control, Recover(page))
    looked = ask(engine.control, Evict(to="file", idle=0.0))
    assert (looked.disk, looked.file) == (99 * PAGE_SIZE, (1024 - 100) * PAGE_SIZE)
    assert target.ask("r 150") == "150"
    assert ask(engine.control, Release()).disk == 0
    engine.join()


def test_pages_are_brought_back_before_somebody_writes_to_their_image(
    target: Target, directory: Path, tmp_path: Path
) -> None:
    engine = Engine(directory, target.pid, disks=[held_on_disk(target, tmp_path / "image")])
    ask(engine.control, Learn())
    assert ask(engine.control, Evict(to="file", idle=0.0)).disk == 100 * PAGE_SIZE
    # The kernel lets us in only when the engine has let go.
    with (tmp_path / "image").open("r+b") as image:
        image.write(b"?" * 100 * PAGE_SIZE)
    assert ask(engine.control, Look()).disk == 0
    assert target.ask("r 150") == "150"
    assert ask(engine.control, Evict(to="file", idle=0.0)).disk == 0
    ask(engine.control, Release())
    engine.join()


def test_other_orders_are_heard_while_an_eviction_watches(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    with pytest.raises(UnreachableError, match="not answered within"):
        ask(engine.control, Evict(to="file", idle=60.0), timeout=0.2)
    failures: list[str] = []

    def watch() -> None:
        while not failures:
            try:
                ask(engine.control, Evict(to="file", idle=60.0))
            except RefusedError:
                # One of the short ones below is being watched just now.
                continue
            except OutboardError as error:
                failures.append(str(error))

    watcher = threading.Thread(target=watch)
    watcher.start()
    # The one that went away is not watched for any more; the second is, and a third has to wait.
    while True:
        try:
            ask(engine.control, Evict(to="file", idle=0.001), timeout=5)
        except RefusedError as error:
            assert "being watched for another eviction" in str(error)  # noqa: PT017  # until the second is there
            break
    assert ask(engine.control, Look()).file == 0 or ask(engine.control, Fetch()).file == 0
    ask(engine.control, Release())
    engine.join()
    watcher.join(10)
    assert failures == ["target was let go while it was watched"]


def test_nothing_of_another_guest_is_removed(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    others = [directory.parent / "swap" / name for name in ("target2", "target-old.slots", "target.other")]
    for other in others:
        other.touch()
    ask(engine.control, Release())
    engine.join()
    assert all(other.exists() for other in others)
    assert sorted(path.name for path in (directory.parent / "swap").iterdir()) == sorted(one.name for one in others)


def test_what_a_power_cut_left_is_not_in_the_way(target: Target, directory: Path) -> None:
    (directory.parent / "swap").mkdir()
    for end in ("", ".slots", ".digests"):
        (directory.parent / "swap" / f"target{end}").write_bytes(b"of another size")
    engine = Engine(directory, target.pid)
    assert ask(engine.control, Evict(to="file", idle=0.0)).file > 0
    ask(engine.control, Release())
    engine.join()


def test_a_guest_that_cannot_be_managed_is_left_alone(target: Target, directory: Path) -> None:
    def large() -> Guest:
        with guest_of(target) as guest:
            region = dataclasses.replace(guest.regions[0], page_size=2 << 20)
            return Guest("web", guest.pid, (region,))

    with pytest.raises(RefusedError) as caught:
        Manager(directory, large, directory.parent / "swap" / "web")
    assert caught.value.reason == "large-pages"
    assert not directory.exists()
    assert not list((directory.parent / "swap").iterdir())
    assert not [link for link in proc.descriptors(target.pid).values() if "userfaultfd" in link]


def test_the_coldest_go_first(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(most=0, idle=0.01))
    touching = threading.Event()
    passes: list[int] = []

    def touch() -> None:
        while not touching.is_set():
            for page in range(512):
                target.ask(f"r {page}")
            passes.append(512)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        # Until one look saw all of them touched.
        while True:
            before = len(passes)
            ask(engine.control, Evict(most=0, idle=0.3))
            if len(passes) >= before + 2:
                break
    finally:
        touching.set()
        toucher.join()
    # All are idle now, and half of them were not before.
    assert ask(engine.control, Evict(to="file", most=2 << 20, idle=0.05)).moved == 2 << 20
    for page in range(512):
        target.ask(f"r {page}")
    # What another processor has just taken in is not known to be idle, and others go in its place.
    assert ask(engine.control, Look()).file > 15 << 17
    ask(engine.control, Release())
    engine.join()


def test_another_engine_is_refused_and_a_successor_is_let_in(target: Target, directory: Path) -> None:
    first = Engine(directory, target.pid)
    ask(first.control, Evict(to="file", idle=0.0))
    with pytest.raises(RefusedError, match=f"engine {os.getpid()} has this guest") as caught:
        Engine(directory, target.pid)
    assert caught.value.reason == "managed"
    second = Engine(directory, target.pid, successor=True)
    first.join()
    assert target.ask("r 900") == "900"
    assert ask(second.control, Release()).file == 0
    second.join()


def test_a_guest_that_is_handed_over_to_nobody_waits(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    ask(engine.control, HandOver())
    engine.join()
    with pytest.raises(UnreachableError, match="no answer from the engine"):
        ask(engine.control, Look())
    target.say("r 5")
    assert target.waits()
    again = Engine(directory, target.pid)
    assert target.answer() == "5"
    ask(again.control, Release())
    again.join()


def test_a_guest_that_ends_is_forgotten(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    os.kill(target.pid, signal.SIGKILL)
    engine.join()
    assert not directory.exists()
    assert not list((directory.parent / "swap").iterdir())


def test_a_guest_that_ends_while_pages_are_brought_back_is_forgotten(
    target: Target, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def brought_back(_manager: Manager) -> None:
        os.kill(target.pid, signal.SIGKILL)
        raise KernelError("UFFDIO_COPY", errno.ESRCH)

    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    monkeypatch.setattr(Manager, "_leave_disks", brought_back)
    engine.join()
    assert not directory.exists()
    assert not list((directory.parent / "swap").iterdir())


def test_what_belongs_to_another_of_its_name_stays(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    # Whoever stops a VM removes its directory, and the next of that name may be there before this engine hears of it.
    shutil.rmtree(directory)
    directory.mkdir()
    lock = hold(directory, successor=False)
    (directory / "where").touch()
    os.kill(target.pid, signal.SIGKILL)
    engine.join()
    assert sorted(path.name for path in directory.iterdir()) == ["lock", "where"]
    assert list((directory.parent / "swap").iterdir())
    os.close(lock)


def test_the_swap_file_of_a_guest_whose_directory_has_gone_goes(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    shutil.rmtree(directory)
    os.kill(target.pid, signal.SIGKILL)
    engine.join()
    assert not directory.exists()
    assert not list((directory.parent / "swap").iterdir())


def test_what_another_guest_left_is_not_taken_for_this_ones(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    ask(engine.control, Evict(to="file", idle=0.0))
    ask(engine.control, HandOver())
    engine.join()
    with Target(mebibytes=4) as other:
        (directory / "layout.json").write_bytes(
            (directory / "layout.json").read_bytes().replace(str(target.pid).encode(), str(other.pid).encode())
        )
        fresh = Engine(directory, other.pid)
        assert ask(fresh.control, Look()).resident == other.size
        ask(fresh.control, Release())
        fresh.join()


def test_what_is_no_order_is_not_answered(target: Target, directory: Path) -> None:
    engine = Engine(directory, target.pid)
    for words in (b'{"type":"explode"}', b"nonsense", b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(engine.control))
            with Connection(os.dup(client.fileno())) as connection:
                connection.send_bytes(words)
                with pytest.raises((EOFError, OSError)):
                    connection.recv_bytes()
    ask(engine.control, Release())
    engine.join()


def test_nothing_is_left_of_an_engine_that_could_not_begin(directory: Path) -> None:
    with pytest.raises(NotFoundError):
        Manager(directory, partial(attach_process, 4194303), directory.parent / "swap" / "x")
    with pytest.raises(NotFoundError):
        Manager(directory, partial(attach_process, 4194303), directory.parent / "swap" / "x")
