"""Placing large pages of hugetlbfs, and serving faults on them."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import PeerError, RefusedError
from outboard.pager.arriving import ArrivingMemory
from outboard.pager.arriving_large import ArrivingLargeMemory, arriving_kind
from outboard.pager.peer_faults import FaultCounters, PeerFaultServer
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.stores.peer import PeerStore
from outboard.vmm.guest import Guest
from outboard.wire.channel import Channel
from tests.support.machine import huge_pages
from tests.support.process_guest import guest_of
from tests.support.target import Target

LARGE = 512


@pytest.fixture
def target() -> Iterator[Target]:
    with huge_pages(4), Target("hugetlb", mebibytes=8) as target:
        yield target


@pytest.fixture
def memory(target: Target, tmp_path: Path) -> Iterator[ArrivingMemory]:
    with guest_of(target) as guest:
        memory = arriving_kind(guest)(guest, tmp_path)
        yield memory
        memory.release()


def whole(memory: ArrivingMemory, first: int, **words: int) -> list[int]:
    """A large page whose small ones are zeros but for those named p0 to p511; whoever waits for it."""
    zero = np.ones(LARGE, dtype=np.bool_)
    content = b""
    for name, value in sorted(words.items(), key=lambda word: int(word[0][1:])):
        zero[int(name[1:])] = False
        content += value.to_bytes(8, "little") + bytes(4088)
    waited = memory.place(np.array([[first, LARGE]]), zero, np.frombuffer(content, dtype=np.uint8))
    return [int(page) for page in waited]


def part(memory: ArrivingMemory, first: int, value: int) -> None:
    content = np.frombuffer(value.to_bytes(8, "little") + bytes(4088), dtype=np.uint8)
    memory.place(np.array([[first, 1]]), np.zeros(1, dtype=np.bool_), content)


def test_a_large_page_comes_whole(target: Target, memory: ArrivingMemory) -> None:
    assert whole(memory, LARGE, p0=7, p3=8, p511=9) == []
    assert [target.ask(f"r {LARGE + page}") for page in (0, 1, 3, 511)] == ["7", "0", "8", "9"]
    assert (memory.residency.where[LARGE : 2 * LARGE] == Where.RESIDENT).all()
    assert (memory.residency.where[:LARGE] == Where.PEER).all()


def test_before_the_guest_runs_its_parts_may_come_again(target: Target, memory: ArrivingMemory) -> None:
    whole(memory, 0, p0=7, p3=8)
    part(memory, 3, 80)
    memory.place(np.array([[0, 1]]), np.ones(1, dtype=np.bool_), np.empty(0, dtype=np.uint8))
    assert [target.ask(f"r {page}") for page in (0, 3)] == ["0", "80"]
    whole(memory, 0, p1=5)
    assert [target.ask(f"r {page}") for page in (0, 1, 3)] == ["0", "5", "0"]


def test_once_it_runs_what_is_present_stands(target: Target, memory: ArrivingMemory) -> None:
    whole(memory, 0, p0=7)
    memory.run()
    whole(memory, 0, p0=8)
    assert target.ask("r 0") == "7"


def test_a_part_of_what_is_not_there_is_refused(memory: ArrivingMemory) -> None:
    with pytest.raises(PeerError, match="not here yet"):
        part(memory, 3, 1)
    with pytest.raises(PeerError, match="a part of one was to be forgotten"):
        memory.forget(PageSet.from_runs(memory.guest.pages, np.array([[0, 5]])))


def test_of_a_large_page_that_lives_no_part_is_taken_for_zeros(target: Target, memory: ArrivingMemory) -> None:
    dead = PageSet.from_runs(target.pages, np.array([[5, 2 * LARGE]]))
    memory.note_zero_set(dead)
    assert memory.residency.pages_at(Where.ZERO) == PageSet.from_runs(target.pages, np.array([[LARGE, LARGE]]))


def test_faults_are_served_whole(target: Target, memory: ArrivingMemory) -> None:
    ours, theirs = socket.socketpair()
    source = Channel(theirs, "destination", target.pages)
    link, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    counters = FaultCounters()
    server = PeerFaultServer(memory, PeerStore(Channel(ours, "source", target.pages)), counters, far)
    thread = threading.Thread(target=server.serve)
    thread.start()
    link.send(b"open")
    target.say(f"r {LARGE + 9}")
    assert source.requested(source.receive(10)) == (LARGE,)
    zero = np.ones(LARGE, dtype=np.bool_)
    zero[9] = False
    source.send_pages([(LARGE, LARGE)], zero, memoryview((99).to_bytes(8, "little") + bytes(4088)))
    assert target.answer() == "99"
    whole(memory, 2 * LARGE)
    assert target.ask(f"r {2 * LARGE + 5}") == "0"
    assert target.ask(f"r {LARGE}") == "0"
    link.send(b"stop")
    thread.join()
    assert counters.statistics().remote == 1
    assert counters.statistics().zero == 1
    for one in (ours, theirs, link, far):
        one.close()


def test_what_a_dead_engine_left_is_taken_again(target: Target, tmp_path: Path) -> None:
    with guest_of(target) as guest:
        first = arriving_kind(guest)(guest, tmp_path)
        whole(first, 0, p0=7)
        whole(first, LARGE, p0=8)
        first.residency.where[LARGE : 2 * LARGE] = Where.PEER
        first.uffd.close()
        again = arriving_kind(guest).take_again(guest, tmp_path)
        assert again.residency.pages_at(Where.RESIDENT) == PageSet.from_runs(guest.pages, np.array([[0, 2 * LARGE]]))
        again.release()
        assert target.ask(f"r {LARGE}") == "8"


def test_kinds() -> None:
    with Target(mebibytes=4) as target, guest_of(target) as guest:
        assert arriving_kind(guest) is ArrivingMemory
        for size, kind in ((2 << 20, ArrivingLargeMemory), (1 << 30, None)):
            region = dataclasses.replace(guest.regions[0], page_size=size)
            other = Guest("other", target.pid, (region,))
            if kind is None:
                with pytest.raises(RefusedError, match="1048576 KiB"):
                    arriving_kind(other)
            else:
                assert arriving_kind(other) is kind
            other.close()
