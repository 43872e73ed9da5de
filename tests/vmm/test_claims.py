"""A VMM's claims against mappings as the kernel would tell them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from outboard.errors import PeerError
from outboard.linux import proc
from outboard.linux.proc import Mapping
from outboard.vmm import claims
from outboard.vmm.guest import Guest, Region
from outboard.vmm.handoff import Claim
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 1 << 20
LOW = 0x7F00_0000_0000
HIGH = 0x7F80_0000_0000


def shared(start: int, size: int, offset: int = 0, inode: int = 9, permissions: str = "rw-s") -> Mapping:
    return Mapping(start, start + size, permissions, offset, "00:01", inode, "/memfd:ch_ram (deleted)")


def anonymous(start: int, size: int, permissions: str = "rw-p") -> Mapping:
    return Mapping(start, start + size, permissions, 0, "00:00", 0, "")


def regions_of(
    told: list[Claim], mappings: list[Mapping], after: tuple[Region, ...] = (), page_size: int = 4096
) -> tuple[Region, ...]:
    return claims.regions_of(told, mappings, lambda _: page_size, after)


def test_pages_are_numbered_by_guest_physical_address() -> None:
    mappings = [shared(LOW, MIB), shared(HIGH, 2 * MIB, inode=10)]
    found = regions_of([Claim(4 << 30, HIGH, 2 * MIB, 0, 0), Claim(0, LOW, MIB, 0, 0)], mappings)
    assert [(one.first, one.pages, one.gpa, one.hva, one.has_file) for one in found] == [
        (0, 256, 0, LOW, True),
        (256, 512, 4 << 30, HIGH, True),
    ]
    assert [one.mapping for one in found] == mappings


def test_memory_that_is_added_is_numbered_behind_whatever_its_address() -> None:
    mappings = [shared(LOW, MIB), shared(HIGH, MIB, inode=10)]
    before = regions_of([Claim(4 << 30, LOW, MIB, 0, 0)], mappings)
    (added,) = regions_of([Claim(0, HIGH, MIB, 0, 0)], mappings, before)
    assert (added.first, added.pages, added.gpa) == (256, 256, 0)


def test_a_claim_inside_a_mapping_and_one_over_several() -> None:
    (inside,) = regions_of([Claim(0, LOW + MIB, MIB, 5 * MIB, 0)], [shared(LOW, 4 * MIB, offset=4 * MIB)])
    assert inside.offset == 5 * MIB
    cut = [shared(LOW, MIB), shared(LOW + MIB, MIB, offset=MIB)]
    assert regions_of([Claim(0, LOW, 2 * MIB, 0, 0)], cut)[0].mapping is cut[0]
    # Firecracker protects what is not plugged in yet.
    two = [anonymous(LOW, MIB), anonymous(LOW + MIB, MIB, "---p")]
    assert not regions_of([Claim(0, LOW, 2 * MIB, 0, 4096)], two)[0].has_file


def test_a_private_mapping_of_a_file_is_not_read_by_the_file() -> None:
    (found,) = regions_of([Claim(0, LOW, MIB, 0, 0)], [shared(LOW, MIB, permissions="rw-p")])
    assert not found.has_file


@pytest.mark.parametrize(
    ("told", "mappings", "words"),
    [
        ([Claim(0, LOW, MIB, 0, 0)], [], "goes on at 0x7f0000000000, where it has no mapping"),
        ([Claim(0, LOW, 2 * MIB, 0, 0)], [shared(LOW, MIB)], "goes on at 0x7f0000100000"),
        ([Claim(0, LOW, 2 * MIB, 0, 0)], [shared(LOW, MIB), shared(LOW + 2 * MIB, MIB)], "goes on at 0x7f0000100000"),
        ([Claim(0, LOW, MIB, 4096, 0)], [shared(LOW, MIB)], "said to be at 0x1000 of .*the kernel has it at 0x0"),
        ([Claim(0, LOW, MIB, 0, 0)], [shared(LOW, MIB, permissions="r--s")], "has not mapped for writing"),
        (
            [Claim(0, LOW, 2 * MIB, 0, 0)],
            [shared(LOW, MIB), shared(LOW + MIB, MIB, inode=10, offset=MIB)],
            "more than one file",
        ),
        ([Claim(0, LOW, 2 * MIB, 0, 0)], [shared(LOW, MIB), shared(LOW + MIB, MIB)], "more than one file"),
        ([Claim(0, LOW, 2 * MIB, 0, 0)], [shared(LOW, MIB), anonymous(LOW + MIB, MIB)], "more than one file"),
        (
            [Claim(0, LOW, MIB, 0, 0), Claim(0, HIGH, MIB, 0, 0)],
            [shared(LOW, MIB), shared(HIGH, MIB, inode=10)],
            "guest-physical addresses in common",
        ),
        (
            [Claim(0, LOW, 2 * MIB, 0, 0), Claim(4 << 30, LOW + MIB, MIB, MIB, 0)],
            [shared(LOW, 2 * MIB)],
            "has addresses in common",
        ),
        (
            [Claim(0, LOW, MIB, 0, 0), Claim(4 << 30, HIGH, MIB, 0, 0)],
            [shared(LOW, MIB), shared(HIGH, MIB)],
            "bytes of a file in common",
        ),
    ],
)
def test_what_the_kernel_does_not_confirm(told: list[Claim], mappings: list[Mapping], words: str) -> None:
    with pytest.raises(PeerError, match=words):
        regions_of(told, mappings)


def test_memory_that_is_added_over_what_is_there() -> None:
    mappings = [shared(LOW, 2 * MIB)]
    before = regions_of([Claim(0, LOW, MIB, 0, 0)], mappings)
    with pytest.raises(PeerError, match="in common"):
        regions_of([Claim(4 << 30, LOW, MIB, 0, 0)], mappings, before)


def test_large_pages_are_whole() -> None:
    (found,) = regions_of([Claim(0, LOW, 4 * MIB, 0, 0)], [shared(LOW, 4 * MIB)], page_size=2 * MIB)
    assert found.page_size == 2 * MIB
    with pytest.raises(PeerError, match="no whole pages of 2097152 bytes"):
        regions_of([Claim(0, LOW + MIB, MIB, MIB, 0)], [shared(LOW, 4 * MIB)], page_size=2 * MIB)


def test_page_sizes_are_asked_of_the_file_system() -> None:
    require("root")
    with Target("memfd", 1) as target, guest_of(target) as guest:
        assert claims.page_size_in(target.pid)(guest.regions[0].mapping) == 4096
    assert claims.page_size_in(target.pid)(anonymous(LOW, MIB)) == 4096


def test_a_device_is_no_guest_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "open_mapping", lambda *_: os.open("/dev/null", os.O_PATH))
    with pytest.raises(PeerError, match="no plain file"):
        claims.page_size_in(os.getpid())(shared(LOW, MIB))


def test_a_file_that_was_exchanged_meanwhile_is_seen(tmp_path: Path) -> None:
    require("root")
    with Target("memfd", 1) as target, guest_of(target) as guest:
        claims.check_files(guest.memory)
        other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
        os.dup2(other, next(guest.memory.files())[1])
        os.close(other)
        with pytest.raises(PeerError, match="mapped another file"):
            claims.check_files(guest.memory)


def test_the_same_inode_of_another_file_system_is_another_file() -> None:
    require("root")
    with Target("memfd", 1) as target, guest_of(target) as guest:
        (region,) = guest.regions
        elsewhere = replace(region, mapping=replace(region.mapping, device="fd:01"))
        with Guest("target", target.pid, (elsewhere,)) as other, pytest.raises(PeerError, match="mapped another file"):
            claims.check_files(other.memory)


def test_more_regions_than_any_vmm_has() -> None:
    mappings = [shared(LOW, 64 * MIB)]
    most = [Claim(at << 20, LOW + (at << 20), 4096, at << 20, 0) for at in range(claims.MAX_REGIONS)]
    before = regions_of(most, mappings)
    with pytest.raises(PeerError, match="65 regions"):
        regions_of([Claim(1 << 40, LOW + 8192, 4096, 8192, 0)], mappings, before)
