"""Placing pages and serving faults, in a process whose memory is absent at first."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux import proc
from outboard.pager.arriving import ArrivingMemory
from outboard.pager.peer_faults import FaultCounters, PeerFaultServer
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.stores.peer import PeerStore
from outboard.vmm.guest import VCpu
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind
from tests.support.process_guest import guest_of
from tests.support.target import Target


def word(number: int) -> bytearray:
    """A page that begins with a word."""
    return bytearray(number.to_bytes(8, "little") + bytes(4088))


def place(pager: ArrivingMemory, first: int, content: bytearray) -> list[int]:
    """Put pages in, none of them zeros; those that somebody waits for."""
    count = len(content) // 4096
    runs, zero = np.array([[first, count]]), np.zeros(count, dtype=np.bool_)
    return [int(page) for page in pager.place(runs, zero, np.frombuffer(content, dtype=np.uint8))]


def place_zeros(pager: ArrivingMemory, first: int, count: int) -> None:
    pager.place(np.array([[first, count]]), np.ones(count, dtype=np.bool_), np.empty(0, dtype=np.uint8))


class Scene:
    """A target, its pager, and a peer that answers requests with 1000 + the page's number.

    :param vcpu: the target's main thread, which does what it is told, is a vCPU.
    """

    def __init__(self, *, vcpu: bool = False) -> None:
        self.target = Target(mebibytes=4)
        self.guest = guest_of(self.target)
        self._journal = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.pager = ArrivingMemory(self.guest, Path(self._journal.name))
        if vcpu:
            self.guest.vcpus = (VCpu(0, self.target.pid),)
        ours, theirs = socket.socketpair()
        self._theirs = Channel(theirs, "peer", self.target.pages)
        self._link, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.counters = FaultCounters()
        self.asked: list[int] = []
        self.silent: set[int] = set()
        server = PeerFaultServer(self.pager, PeerStore(Channel(ours, "source", self.target.pages)), self.counters, link)
        self._server = threading.Thread(target=server.serve)
        self._server.start()
        self._ours, self._far_link = ours, link
        self._peer = threading.Thread(target=self._answer)
        self._peer.start()

    def _answer(self) -> None:
        while True:
            frame = self._theirs.receive()
            if frame.kind is not Kind.REQUEST:
                return
            for page in self._theirs.requested(frame):
                self.asked.append(page)
                if page not in self.silent:
                    zero = np.array([page % 10 == 9])
                    content = b"" if zero[0] else bytes(word(1000 + page))
                    self._theirs.send_pages([(page, 1)], zero, memoryview(content))

    def tell(self, command: bytes) -> None:
        self._link.send(command)

    def close(self) -> None:
        self.tell(b"stop")
        self._server.join()
        Channel(self._ours, "source").send_message(b"end")
        self._peer.join()
        for one in (self._ours, self._theirs, self._link, self._far_link):
            one.close()
        self.target.__exit__(None, None, None)
        # Letting go takes a thread that is no vCPU.
        self.guest.vcpus = ()
        self.pager.release()
        self.guest.memory.close()
        self._journal.cleanup()


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def test_a_fault_is_answered_by_the_peer(scene: Scene) -> None:
    scene.tell(b"open")
    assert scene.target.ask("r 7") == "1007"
    assert scene.target.ask("r 7") == "1007"
    assert scene.target.ask("r 19") == "0"
    assert scene.asked == [7, 19]
    while scene.counters.statistics().remote < 2:
        os.sched_yield()
    assert scene.counters.statistics().latencies.count == 2
    assert scene.pager.residency.where[7] == Where.RESIDENT


@pytest.mark.parametrize("vcpu", [False, True])
def test_the_faults_of_threads_that_are_no_vcpus_are_told_apart(vcpu: bool) -> None:
    scene = Scene(vcpu=vcpu)
    try:
        scene.tell(b"open")
        assert scene.target.ask("r 7") == "1007"
        scene.pager.run()
        for page in range(100, 135):
            assert scene.target.ask(f"r {page}") == str(0 if page % 10 == 9 else 1000 + page)
        while (served := scene.counters.statistics()).remote < 36:
            os.sched_yield()
        assert (served.loading, served.device) == ((0, 0) if vcpu else (1, 35))
        assert served.device_pages == (() if vcpu else (7, *range(100, 131)))
    finally:
        scene.close()


def test_requests_are_held_until_the_peer_is_final(scene: Scene) -> None:
    scene.target.say("r 7")
    place(scene.pager, 8, word(8))
    assert scene.asked == []
    scene.tell(b"open")
    assert scene.target.answer() == "1007"


def test_what_was_placed_before_takes_no_fault(scene: Scene) -> None:
    place(scene.pager, 20, word(1) + word(2) + word(3))
    scene.tell(b"open")
    assert [scene.target.ask(f"r {page}") for page in (20, 21, 22)] == ["1", "2", "3"]
    assert scene.asked == []
    assert scene.counters.statistics().remote == 0


def test_before_the_guest_runs_the_later_content_stands(scene: Scene) -> None:
    place(scene.pager, 5, word(1))
    place(scene.pager, 4, word(2) + word(3) + word(4))
    assert [scene.target.ask(f"r {page}") for page in (4, 5, 6)] == ["2", "3", "4"]


def test_once_it_runs_what_is_present_stands(scene: Scene) -> None:
    place(scene.pager, 5, word(1))
    scene.pager.run()
    assert scene.target.ask("w 5 77") == "written"
    place(scene.pager, 4, word(2) + word(3) + word(4))
    assert [scene.target.ask(f"r {page}") for page in (4, 5, 6)] == ["2", "77", "4"]


@pytest.mark.parametrize("running", [False, True])
def test_a_frame_of_all_kinds(scene: Scene, running: bool) -> None:
    """Zeros and content, over what is present, what is known to be zeros, and what is absent."""
    place(scene.pager, 10, word(1) + word(2) + word(3))
    place_zeros(scene.pager, 13, 2)
    if running:
        scene.pager.run()
    runs, zero = np.array([[10, 7], [20, 2]]), np.array([1, 0, 1, 0, 1, 0, 1, 1, 0], dtype=np.bool_)
    content = np.frombuffer(word(11) + word(13) + word(15) + word(21), dtype=np.uint8)
    assert scene.pager.place(runs, zero, content).size == 0
    where = scene.pager.residency.where
    scene.tell(b"open")
    read = [int(scene.target.ask(f"r {page}")) for page in (*range(10, 17), 20, 21)]
    if running:
        assert read == [1, 2, 3, 13, 0, 15, 0, 0, 21]
    else:
        assert read == [0, 11, 0, 13, 0, 15, 0, 0, 21]
    assert scene.asked == []
    assert (where[[10, 11, 13, 15, 21]] == Where.RESIDENT).all()


def test_before_the_guest_runs_content_stands_also_over_what_was_not_known_to_be_present(scene: Scene) -> None:
    """As where a hole was punched into a large page, and the kernel could not split that."""
    place(scene.pager, 5, word(1) + word(2) + word(3))
    scene.pager.residency.where[6] = Where.ZERO
    place(scene.pager, 5, word(4) + word(5) + word(6))
    assert [scene.target.ask(f"r {page}") for page in (5, 6, 7)] == ["4", "5", "6"]
    scene.pager.residency.where[6] = Where.PEER
    scene.pager.run()
    place(scene.pager, 6, word(7))
    assert scene.target.ask("r 6") == "5"


def test_placing_in_a_process_that_has_ended_says_so(tmp_path: Path) -> None:
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        memory = ArrivingMemory(guest, tmp_path)
        target.say("q")
        target.ended()
        with pytest.raises(KernelError, match="placing of 1 pages in target"):
            place(memory, 5, word(1))
        memory.release()


def test_known_zeros_cost_neither_a_request_nor_memory(scene: Scene) -> None:
    scene.tell(b"open")
    place_zeros(scene.pager, 30, 10)
    assert len(scene.guest.memory.populated()) == 0
    assert scene.target.ask("r 33") == "0"
    assert scene.asked == []
    while not scene.counters.statistics().zero:
        os.sched_yield()
    assert len(scene.guest.memory.populated()) == 1


def test_a_page_that_turns_out_zero_while_it_is_waited_for(scene: Scene) -> None:
    scene.tell(b"open")
    scene.silent.add(40)
    scene.target.say("r 40")
    while not scene.asked:
        os.sched_yield()
    scene.pager.run()
    place_zeros(scene.pager, 40, 1)
    assert scene.target.answer() == "0"


def test_the_bulk_brings_a_page_that_is_waited_for(scene: Scene) -> None:
    scene.tell(b"open")
    scene.silent.add(40)
    scene.target.say("r 40")
    while not scene.asked:
        os.sched_yield()
    scene.pager.run()
    assert scene.pager.waiting[40]
    assert place(scene.pager, 39, word(3) + word(4)) == [40]
    assert scene.target.answer() == "4"
    scene.tell((40).to_bytes(8, "little"))
    while not scene.counters.statistics().remote:
        os.sched_yield()


def test_a_set_of_zeros_leaves_what_is_present(scene: Scene) -> None:
    place(scene.pager, 5, word(1))
    scene.pager.note_zero_set(PageSet.full(scene.target.pages))
    assert scene.pager.residency.count(Where.PEER) == 0
    assert scene.target.ask("r 5") == "1"
    assert scene.target.ask("r 6") == "0"


def test_forgotten_pages_are_absent_again(scene: Scene) -> None:
    place(scene.pager, 5, word(1) + word(2))
    scene.pager.forget(PageSet.from_runs(scene.target.pages, np.array([[6, 1]])))
    scene.tell(b"open")
    assert scene.target.ask("r 5") == "1"
    assert scene.target.ask("r 6") == "1006"
    scene.pager.run()
    with pytest.raises(ValueError, match="truth"):
        scene.pager.forget(PageSet(scene.target.pages))


def test_what_was_placed_is_held_until_somebody_may_write_it(scene: Scene) -> None:
    place(scene.pager, 5, word(1))
    room = bytearray(4096)
    assert scene.pager.held(5, memoryview(room))
    assert room == word(1)
    place_zeros(scene.pager, 7, 1)
    assert not scene.pager.held(6, memoryview(room))
    assert not scene.pager.held(7, memoryview(room))
    scene.pager.run()
    assert not scene.pager.held(5, memoryview(room))


def test_zeros_replace_content_before_the_guest_runs(scene: Scene) -> None:
    place(scene.pager, 5, word(1))
    place_zeros(scene.pager, 5, 1)
    assert scene.target.ask("r 5") == "0"


def test_what_a_dead_engine_left_is_taken_again(tmp_path: Path) -> None:
    """It has placed two pages and noted one, and a page waits."""
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        first = ArrivingMemory(guest, tmp_path)
        for page in (3, 4):
            place(first, page, word(page + 10))
        place_zeros(first, 5, 1)
        first.residency.where[4] = Where.PEER
        first.run()
        target.say("r 7")
        assert target.waits()
        first.uffd.close()
        with pytest.raises(RefusedError):
            ArrivingMemory(guest, tmp_path)
        again = ArrivingMemory.take_again(guest, tmp_path)
        assert again.running
        assert [again.residency.where[page] for page in (3, 4, 5, 7)] == [
            Where.RESIDENT,
            Where.RESIDENT,
            Where.ZERO,
            Where.PEER,
        ]
        place(again, 7, word(77))
        assert target.answer() == "77"
        again.release()
        assert target.ask("r 4") == "14"
        with pytest.raises(OutboardError, match="held by nobody"):
            ArrivingMemory.take_again(guest, tmp_path)


def test_without_a_peer_only_what_is_there_waits_for_nobody(tmp_path: Path) -> None:
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        memory = ArrivingMemory(guest, tmp_path)
        memory.run()
        place_zeros(memory, 5, 1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = PeerFaultServer(memory, PeerStore(None), FaultCounters(), theirs)
        thread = threading.Thread(target=server.serve)
        thread.start()
        assert target.ask("r 5") == "0"
        target.say("r 6")
        assert target.waits()
        place(memory, 6, word(66))
        assert target.answer() == "66"
        ours.send(b"stop")
        thread.join()
        memory.release()
        ours.close()
        theirs.close()


def test_released_memory_is_the_processes_own(tmp_path: Path) -> None:
    with Target(mebibytes=1) as target:
        guest = guest_of(target)
        before = set(proc.descriptors(target.pid))
        pager = ArrivingMemory(guest, tmp_path)
        place(pager, 0, word(3))
        assert len(set(proc.descriptors(target.pid)) - before) == 1
        pager.release()
        assert set(proc.descriptors(target.pid)) == before
        assert target.ask("r 0") == "3"
        assert target.ask("r 1") == "0"
        guest.memory.close()


def test_while_nobody_serves_a_fault_waits_and_a_successor_answers_it(scene: Scene) -> None:
    scene.target.say("r 50")
    scene.tell(b"open")
    assert scene.target.answer() == "1050"
