"""Rings as guests write them, also maliciously, and as QEMU tells of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest
from outboard.vmm.monitor import Monitor, MonitorError
from outboard.vmm.virtqueues import DevicePages, Queue, Queues, find, pieces
from tests.support.process_guest import guest_of
from tests.support.target import Target

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAILABLE, USED = 1 << 7, 1 << 15
QUEUE = Queue(8, 0x1000, 0x2000, 0x3000)
PACKED = Queue(4, 0x1000, 0x2000, 0x3000, packed=True)


def descriptor(address: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    return struct.pack("<QIHH", address, length, flags, following)


class Memory:
    """Guest-physical memory, zeros where nobody wrote, of 1 MiB."""

    def __init__(self) -> None:
        self._content = bytearray(1 << 20)

    def put(self, address: int, content: bytes) -> None:
        self._content[address : address + len(content)] = content

    def read(self, address: int, size: int) -> bytes | None:
        if address + size > len(self._content):
            return None
        return bytes(self._content[address : address + size])

    def ring(self, queue: Queue, table: list[bytes], heads: list[int], done: int) -> None:
        """Fill a split ring in which ``heads`` are in flight, ``done`` the index that was used last."""
        self.put(queue.descriptors, b"".join(table))
        for index, head in enumerate(heads):
            self.put(queue.driver + 4 + 2 * ((done + index) % queue.size), struct.pack("<H", head))
        self.put(queue.driver + 2, struct.pack("<H", (done + len(heads)) & 0xFFFF))
        self.put(queue.device + 2, struct.pack("<H", done))


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_what_is_between_the_indices_is_in_flight_with_its_chain(memory: Memory) -> None:
    table = [descriptor(0x10000 * (index + 1), 100 + index) for index in range(8)]
    table[2] = descriptor(0x30000, 16, NEXT, 5)
    table[5] = descriptor(0x60000, 4096, NEXT | WRITE, 7)
    for done in (0, 3, 0xFFFF):
        memory.ring(QUEUE, table, [2, 1], done)
        assert list(pieces(QUEUE, memory.read)) == [(0x30000, 16), (0x60000, 4096), (0x80000, 107), (0x20000, 101)]
    memory.ring(QUEUE, table, [], 9)
    assert list(pieces(QUEUE, memory.read)) == []


def test_an_indirect_table_is_a_piece_and_so_is_what_it_names(memory: Memory) -> None:
    memory.put(0x9000, descriptor(0xA000, 10) + descriptor(0xB000, 20))
    memory.ring(QUEUE, [descriptor(0x9000, 32, INDIRECT)], [0], 5)
    assert list(pieces(QUEUE, memory.read)) == [(0x9000, 32), (0xA000, 10), (0xB000, 20)]


def test_chains_that_go_round_or_out_of_the_table_end(memory: Memory) -> None:
    memory.ring(QUEUE, [descriptor(0x10000, 1, NEXT, 1), descriptor(0x20000, 1, NEXT, 0)], [0, 0, 1, 200], 0)
    assert list(pieces(QUEUE, memory.read)) == [(0x10000, 1), (0x20000, 1)]
    memory.ring(QUEUE, [descriptor(0x10000, 1, NEXT, 9)], [0], 0)
    assert list(pieces(QUEUE, memory.read)) == [(0x10000, 1)]


def test_indices_that_are_too_far_apart_tell_nothing(memory: Memory) -> None:
    memory.ring(QUEUE, [descriptor(0x10000, 1)], [0], 0)
    memory.put(QUEUE.driver + 2, struct.pack("<H", 9))
    assert list(pieces(QUEUE, memory.read)) == []


def test_rings_outside_the_memory_tell_nothing(memory: Memory) -> None:
    for queue in (
        Queue(8, 1 << 30, 0x2000, 0x3000),
        Queue(8, 0x1000, 1 << 30, 0x3000),
        Queue(8, 0x1000, 0x2000, 1 << 30),
    ):
        assert list(pieces(queue, memory.read)) == []


def test_of_a_packed_ring_those_whose_flags_differ_are_in_flight(memory: Memory) -> None:
    memory.put(0x9000, descriptor(0xA000, 10))
    memory.put(
        PACKED.descriptors,
        b"".join(
            struct.pack("<QIHH", address, length, 0, flags)
            for address, length, flags in (
                (0x10000, 1, AVAILABLE),
                (0x20000, 2, AVAILABLE | USED),
                (0x9000, 16, USED | INDIRECT),
                (0x40000, 4, 0),
            )
        ),
    )
    assert list(pieces(PACKED, memory.read)) == [(0x10000, 1), (0x9000, 16), (0xA000, 10)]


@given(st.binary(min_size=16, max_size=2048), st.booleans())
def test_whatever_a_guest_writes_it_ends_and_is_bounded(content: bytes, packed: bool) -> None:
    memory = Memory()
    for address in range(0x1000, 0x4000, len(content)):
        memory.put(address, content)
    queue = Queue(64, 0x1000, 0x2000, 0x3000, packed)
    # Indices that are near, so that the rest of the nonsense is looked at.
    memory.put(0x2002, b"\x05\x00")
    memory.put(0x3002, b"\x00\x00")
    assert len(list(pieces(queue, memory.read))) <= 64 * (1 + 1024)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Target(mebibytes=64) as target:
        made = guest_of(target)
        yield made
        made.close()


def write(guest: Guest, address: int, content: bytes) -> None:
    """Write into one page."""
    page = bytearray(PAGE_SIZE)
    number = int(guest.pages_of_pfns(np.array([address // PAGE_SIZE]))[0])
    with memoryview(page) as view:
        guest.memory.read_into(number, view)
        page[address % PAGE_SIZE : address % PAGE_SIZE + len(content)] = content
        guest.memory.write(number, view)


def test_the_pages_of_rings_and_requests_and_not_more_than_are_bearable(guest: Guest) -> None:
    start = guest.regions[0].gpa
    queue = Queue(4, start + 0x1000, start + 0x2FFC, start + 0x4000)
    guest.memory.write(0, memoryview(bytes(8 * PAGE_SIZE)))
    told = DevicePages(guest, Queues((queue,), ""))
    assert told.rings().numbers().tolist() == [1, 2, 3, 4, 0xC0, 0xC1, 0xC2]
    assert len(told.in_flight()) == 0
    write(guest, start + 0x1000, descriptor(start + 0x10FFF, 2) + descriptor(start + 0x20000, 0xFFFFFFFF))
    # The ring of heads begins at the page's edge.
    write(guest, start + 0x2FFE, struct.pack("<H", 1))
    assert told.in_flight().numbers().tolist() == [0x10, 0x11]
    write(guest, start + 0x2FFE, struct.pack("<H", 2))
    write(guest, start + 0x3000, struct.pack("<HH", 0, 1))
    found = told.in_flight()
    assert len(found) == 4096
    assert {0x10, 0x11, 0x20} <= set(found.numbers().tolist())
    beyond = Queue(4, 1 << 50, (1 << 63) + 5, start)
    assert DevicePages(guest, Queues((beyond,), "")).rings().numbers().tolist() == [0, 0xC0, 0xC1, 0xC2]
    assert DevicePages(guest, Queues((beyond,), "")).in_flight() == PageSet(guest.pages)


class ToldMonitor:
    """Answers as QEMU would."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def execute(self, command: str, timeout: float = 30.0, **arguments: object) -> Any:
        assert timeout > 0
        answer = self._answers.get(f"{command} {arguments.get('queue', '')}".strip(), self._answers.get(command))
        if answer is None:
            raise MonitorError(f"{command}: QEMU says: The command {command} has not been found")
        return answer


def told_by(answers: dict[str, Any]) -> Queues:
    return find(cast(Monitor, ToldMonitor(answers)))


def status(*features: str, started: bool = True) -> dict[str, Any]:
    return {"num-vqs": 2, "started": started, "guest-features": {"transports": [f"{one}: words" for one in features]}}


def ring(size: int, address: int) -> dict[str, Any]:
    return {"vring-num": size, "vring-desc": address, "vring-avail": address + 4096, "vring-used": address + 8192}


LIST = {"x-query-virtio": [{"path": "/machine/x", "name": "virtio-blk"}]}
RINGS = {"x-query-virtio-queue-status 0": ring(256, 0x1000), "x-query-virtio-queue-status 1": ring(256, 0)}


def test_what_qemu_tells() -> None:
    assert told_by({**LIST, **RINGS, "x-query-virtio-status": status()}) == Queues(
        (Queue(256, 0x1000, 0x2000, 0x3000),), "1 queues of 1 devices"
    )
    packed = told_by({**LIST, **RINGS, "x-query-virtio-status": status("VIRTIO_F_RING_PACKED")})
    assert packed.queues[0].packed
    assert told_by({**LIST, "x-query-virtio-status": status(started=False)}) == Queues((), "none")
    behind = told_by({**LIST, **RINGS, "x-query-virtio-status": status("VIRTIO_F_IOMMU_PLATFORM")})
    assert behind.queues == ()
    assert "behind an IOMMU" in behind.words


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param({}, id="older than 7.2"),
        pytest.param({"x-query-virtio": [{"name": "virtio-blk"}]}, id="no path"),
        pytest.param({**LIST, "x-query-virtio-status": {"num-vqs": "two"}}, id="no number"),
        pytest.param({"x-query-virtio": 7}, id="no list"),
    ],
)
def test_a_qemu_that_does_not_tell_is_said_to(answers: dict[str, Any]) -> None:
    found = told_by(answers)
    assert found.queues == ()
    assert found.words.startswith("none; QEMU does not tell: ")
