"""Large mappings come back while pages arrive."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.pager.arriving import ArrivingMemory
from outboard.pager.arriving_large import arriving_kind
from outboard.pager.rebuilding import Rebuilding
from outboard.pages import LARGE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.vmm.large_pages import large_mappings
from tests.support.cluster import wait_for
from tests.support.machine import huge_pages, transparent_huge_pages
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def target() -> Iterator[Target]:
    require("pagemap-scan")
    with transparent_huge_pages(), Target("thp", mebibytes=8) as target:
        yield target


@pytest.fixture
def memory(target: Target, tmp_path: Path) -> Iterator[ArrivingMemory]:
    with guest_of(target) as guest:
        memory = arriving_kind(guest)(guest, tmp_path)
        yield memory
        memory.release()


def place(memory: ArrivingMemory, first: int, count: int, value: int) -> None:
    content = np.full(count * 4096, value, dtype=np.uint8)
    memory.place(np.array([[first, count]]), np.zeros(count, dtype=np.bool_), content)


def blocks(memory: ArrivingMemory, first: int, count: int) -> PageSet:
    return PageSet.from_runs(memory.guest.pages, np.array([[first * LARGE, count * LARGE]]))


def needed(rebuilding: Rebuilding) -> bool:
    return rebuilding.needed


def test_a_block_is_rebuilt_when_all_of_it_is_here(memory: ArrivingMemory, target: Target, tmp_path: Path) -> None:
    rebuilding = Rebuilding(memory, tmp_path)
    assert not needed(rebuilding)
    rebuilding.want(blocks(memory, 0, 2) | blocks(memory, 3, 1))
    assert needed(rebuilding)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = threading.Thread(target=rebuilding.serve, args=(theirs,))
    server.start()
    place(memory, 0, LARGE - 1, 7)
    place(memory, 2 * LARGE, LARGE, 9)
    place(memory, LARGE, 100, 8)
    memory.place(np.array([[LARGE + 100, LARGE - 100]]), np.ones(LARGE - 100, dtype=np.bool_), np.empty(0, np.uint8))
    place(memory, 3 * LARGE, LARGE, 6)
    wait_for(lambda: bool(large_mappings(memory.guest)), "a large mapping")
    # Zeros may yet come with content, until the guest runs.
    assert large_mappings(memory.guest) == blocks(memory, 3, 1)
    memory.run()
    wait_for(lambda: len(large_mappings(memory.guest)) == 2 * LARGE, "another")
    # The first lacks a page, and the third was not large before.
    assert large_mappings(memory.guest) == blocks(memory, 1, 1) | blocks(memory, 3, 1)
    assert memory.residency.count(Where.ZERO) == 0
    ours.send(b"stop")
    server.join()
    place(memory, LARGE - 1, 1, 7)
    rebuilding.finish()
    memory.release()
    assert rebuilding.count() == 3
    seven = int.from_bytes(bytes([7]) * 8, "little")
    assert [target.ask(f"r {page}") for page in (0, LARGE - 1, LARGE + 100)] == [str(seven), str(seven), "0"]
    ours.close()
    theirs.close()


def test_what_was_wanted_is_known_to_a_successor(memory: ArrivingMemory, tmp_path: Path) -> None:
    Rebuilding(memory, tmp_path).want(blocks(memory, 1, 1))
    place(memory, 0, 4 * LARGE, 5)
    successor = Rebuilding(memory, tmp_path)
    assert needed(successor)
    successor.finish()
    assert not needed(successor)
    assert large_mappings(memory.guest) == blocks(memory, 1, 1)


def test_once_the_memory_is_its_own_again_blocks_with_holes_and_empty_ones_become_large(
    memory: ArrivingMemory, target: Target, tmp_path: Path
) -> None:
    rebuilding = Rebuilding(memory, tmp_path)
    rebuilding.want(blocks(memory, 0, 3))
    assert rebuilding.wanted
    place(memory, 0, LARGE, 7)
    place(memory, LARGE + 1, 100, 8)
    memory.note_zero_set(PageSet.full(memory.guest.pages))
    memory.run()
    memory.release()
    assert rebuilding.count() == 3
    assert [target.ask(f"r {page}") for page in (LARGE, 2 * LARGE, 2 * LARGE + 9)] == ["0", "0", "0"]
    assert target.ask(f"r {LARGE + 100}") == str(int.from_bytes(bytes([8]) * 8, "little"))


def test_a_large_page_of_zeros_gets_its_memory_again(tmp_path: Path) -> None:
    require("pagemap-scan")
    with huge_pages(4), Target("hugetlb", mebibytes=8) as target, guest_of(target) as guest:
        memory = arriving_kind(guest)(guest, tmp_path)
        rebuilding = Rebuilding(memory, tmp_path)
        rebuilding.want(PageSet.from_runs(guest.pages, np.array([[0, 2 * LARGE]])))
        memory.note_zero_set(PageSet.full(guest.pages))
        memory.run()
        rebuilding.finish()
        memory.release()
        assert rebuilding.count() == 2
        assert target.ask("r 5") == "0"


def test_what_a_peer_names_beyond_whole_blocks_is_nothing(tmp_path: Path) -> None:
    with Target(mebibytes=3) as target, guest_of(target) as guest:
        memory = ArrivingMemory(guest, tmp_path)
        rebuilding = Rebuilding(memory, tmp_path)
        rebuilding.want(PageSet.full(guest.pages))
        place(memory, 0, guest.pages, 5)
        rebuilding.finish()
        memory.release()
        assert not needed(rebuilding)
        assert rebuilding.count() <= 1
