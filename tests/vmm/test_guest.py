"""A guest's memory through its files, on a QEMU with a hole below 4 GiB."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import proc
from outboard.vmm.attach import attach
from outboard.vmm.guest import AnonymousMemory, Guest, Region
from tests.support.machine import Machine
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

HOLE = 524288
"""The page number at which the part above 4 GiB begins."""
PAGES = 786432


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    require("qemu", "root")
    with Machine(3072) as vm, attach(qmp=vm.qmp) as attached:
        yield attached


def view(pages: int) -> memoryview:
    return memoryview(bytearray(pages * 4096))


def test_what_is_written_is_read_across_the_hole(guest: Guest) -> None:
    data = memoryview(os.urandom(6 * 4096))
    guest.memory.write(HOLE - 3, data)
    back = view(6)
    guest.memory.read_into(HOLE - 3, back)
    assert back == data
    one = view(1)
    guest.memory.read_into(HOLE, one)
    assert one == data[3 * 4096 : 4 * 4096]


def test_punched_pages_are_zero_and_unpopulated(guest: Guest) -> None:
    guest.memory.write(HOLE - 8, memoryview(os.urandom(16 * 4096)))
    guest.memory.punch(HOLE - 4, 8)
    back = view(16)
    guest.memory.read_into(HOLE - 8, back)
    assert bytes(back[4 * 4096 : 12 * 4096]) == bytes(8 * 4096)
    assert bytes(back[3 * 4096 : 4 * 4096]) != bytes(4096)
    near = [page for page in range(HOLE - 8, HOLE + 8) if guest.memory.populated().mask()[page]]
    assert near == [*range(HOLE - 8, HOLE - 4), *range(HOLE + 4, HOLE + 8)]


def test_reading_allocates_nothing(guest: Guest) -> None:
    before = len(guest.memory.populated())
    guest.memory.read_into(300000, view(64))
    assert len(guest.memory.populated()) == before
    assert not any("ram" in mapping.path and mapping.shared for mapping in proc.maps(os.getpid()))


@pytest.mark.parametrize("first", [-1, PAGES - 1, PAGES, 1 << 60])
def test_pages_that_the_guest_does_not_have(guest: Guest, first: int) -> None:
    with pytest.raises(ValueError, match="not all the guest's"):
        guest.memory.read_into(first, view(2))
    with pytest.raises(ValueError, match="not all the guest's"):
        guest.memory.write(first, view(2))
    with pytest.raises(ValueError, match="not all the guest's"):
        guest.memory.punch(first, 2)


def test_frame_numbers_become_page_numbers(guest: Guest) -> None:
    frames = np.array([0, HOLE - 1, HOLE, (4 << 30) // 4096, (4 << 30) // 4096 + 262143, (4 << 30) // 4096 + 262144])
    assert guest.pages_of_pfns(frames).tolist() == [0, HOLE - 1, -1, HOLE, PAGES - 1, -1]
    far = np.array([2**64 - 1, 2**63], dtype=np.uint64)
    assert guest.pages_of_pfns(far).tolist() == [-1, -1]
    assert guest.pages_of_pfns(np.array([], dtype=np.uint64)).size == 0


def test_memory_outlives_the_files_name_and_the_vm() -> None:
    with Machine(64) as vm, attach(qmp=vm.qmp) as guest:
        guest.memory.write(5, memoryview(b"x" * 4096))
        vm.kill()
        back = view(1)
        guest.memory.read_into(5, back)
        assert bytes(back) == b"x" * 4096


def test_a_failed_read_names_the_pages() -> None:
    with Machine(64) as vm, attach(qmp=vm.qmp) as guest:
        null = os.open("/dev/null", os.O_RDONLY)
        guest.memory._fds = [null]
        with pytest.raises(KernelError, match="read of 2 pages from page 7 of the guest's file came short"):
            guest.memory.read_into(7, view(2))
        with pytest.raises(KernelError, match="write of 2 pages at page 7 of the guest's file: Bad file descriptor"):
            guest.memory.write(7, view(2))


def test_anonymous_memory_is_read_and_written_and_never_touched_where_it_is_absent() -> None:
    require("root")
    with Target("anon", 1) as target, guest_of(target) as guest:
        assert isinstance(guest.memory, AnonymousMemory)
        assert target.ask("d 10 3") == "0"
        assert target.ask("d 250 6") == "0"
        back = view(256)
        back[:] = b"\xff" * len(back)
        guest.memory.read_into(0, back)
        words = np.frombuffer(back, dtype=np.uint64)[::512]
        absent = {10, 11, 12, *range(250, 256)}
        assert words.tolist() == [0 if page in absent else page for page in range(256)]
        assert {page for page in range(256) if page not in guest.memory.populated()} == absent
        data = memoryview(os.urandom(2 * 4096))
        guest.memory.write(12, data)
        assert target.ask("r 12") == str(int.from_bytes(data[:8], "little"))
        with pytest.raises(RefusedError, match="2 pages from page 3 on cannot be freed") as caught:
            guest.memory.punch(3, 2)
        assert caught.value.reason == "anonymous-memory"
        for wrong in (guest.memory.read_into, guest.memory.write):
            with pytest.raises(ValueError, match="not all the guest's"):
                wrong(255, view(2))
        with pytest.raises(ValueError, match="not all the guest's"):
            guest.memory.punch(255, 2)
        target.say("q")
        target.ended()
        with pytest.raises(KernelError):
            guest.memory.read_into(0, view(1))


def test_a_guest_that_grows_is_another_guest() -> None:
    require("root")
    with Target("memfd", 2) as target, guest_of(target) as whole:
        (region,) = whole.regions
        half = Region(0, 256, 0, region.hva, 0, 4096, "target", region.mapping)
        rest = Region(256, 256, 1 << 20, region.hva + (1 << 20), 1 << 20, 4096, "target", region.mapping)
        with Guest("target", target.pid, (half,)) as small, small.grown([rest]) as grown:
            assert (small.pages, grown.pages, small.regions) == (256, 512, (half,))
            one = view(1)
            grown.memory.read_into(300, one)
            assert int.from_bytes(one[:8], "little") == 300
            with pytest.raises(ValueError, match="not all the guest's"):
                small.memory.read_into(300, one)
