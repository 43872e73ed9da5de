"""Where memory is, from texts as QEMU 7.2 prints them, and from what it should never print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import PeerError, RefusedError
from outboard.linux.proc import Mapping
from outboard.vmm.memory_map import Block, RamRange, blocks, ram_ranges, regions_of, widen

MTREE = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "virtio-net-pci", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #2
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): /objects/ram @00000000000c0000 KVM
  00000000000cb000-00000000000cdfff (prio 0, ram): /objects/ram @00000000000cb000 KVM
  00000000000ce000-00000000000e3fff (prio 0, rom): /objects/ram @00000000000ce000
  00000000000e4000-00000000000effff (prio 0, ram): /objects/ram @00000000000e4000 KVM
  00000000000f0000-00000000000fffff (prio 0, rom): /objects/ram @00000000000f0000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): /objects/ram @0000000000100000 KVM
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios KVM
  0000000100000000-000000013fffffff (prio 0, ram): /objects/ram @0000000080000000 KVM

FlatView #3
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000fffff (prio 0, ram): smram
"""
RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total
            /objects/ram    2 MiB  0x0000000000000000 0x00000000c0000000 0x00000000c0000000
                vga.vram    4 KiB  0x00000000c0080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x00000000c2000000 0x0000000000020000 0x0000000000200000
 0000:00:02.0/virtio-net    4 KiB  0x00000000c1080000 0x0000000000080000 0x0000000000080000
"""
RAM = {"/objects/ram": Block(3 << 30, 2 << 20)}
HOLE = [RamRange(0, 2 << 30, "/objects/ram", 0), RamRange(4 << 30, 1 << 30, "/objects/ram", 2 << 30)]


def test_only_the_processors_view_counts() -> None:
    found = ram_ranges(MTREE)
    assert [(one.gpa, one.offset) for one in found if one.name == "/objects/ram"] == [
        (0, 0),
        (0xCB000, 0xCB000),
        (0xE4000, 0xE4000),
        (0x100000, 0x100000),
        (4 << 30, 2 << 30),
    ]
    assert {one.name for one in found} == {"/objects/ram", "vga.vram"}


def test_blocks_have_sizes_and_page_sizes() -> None:
    found = blocks(RAMBLOCK)
    assert found["/objects/ram"] == RAM["/objects/ram"]
    assert found["vga.vram"] == Block(16 << 20, 4096)
    assert "0000:00:02.0/virtio-net" in found


def test_what_the_firmware_hides_is_memory_all_the_same() -> None:
    assert widen(ram_ranges(MTREE), RAM) == HOLE


@pytest.mark.parametrize("text", ["", "unknown command: 'info mtree -f'", 'FlatView #0\n AS "I/O", root: io\n'])
def test_another_output_than_we_know(text: str) -> None:
    with pytest.raises(PeerError, match="its output has changed"):
        ram_ranges(text)


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=6),
)
def test_any_view_of_the_same_memory_widens_to_the_same_regions(
    sizes: list[int], hidden: list[tuple[int, int]]
) -> None:
    """Invariant: as long as something of each piece is seen, and its beginning above the first, all of it is found."""
    pieces, gpa, offset = [], 0, 0
    for size in sizes:
        pieces.append(RamRange(gpa * 4096, size * 4096, "ram", offset * 4096))
        gpa, offset = gpa + size + 1000, offset + size
    covered = {page for start, count in hidden for page in range(start, start + count)}
    seen = [
        RamRange(piece.gpa + at, 4096, "ram", piece.offset + at)
        for index, piece in enumerate(pieces)
        for at in range(0, piece.size, 4096)
        if (piece.offset + at) // 4096 not in covered or at == (piece.size - 4096 if index == 0 else 0)
    ]
    assert widen(seen, {"ram": Block(offset * 4096, 4096)}) == pieces


def mapping(start: int, end: int, offset: int = 0, *, permissions: str = "rw-s", inode: int = 9) -> Mapping:
    return Mapping(start, end, permissions, offset, "00:01", inode, "/memfd:ram (deleted)")


BASE = 0x7F0000000000


def regions(maps: list[Mapping]) -> list[tuple[int, int, int, int]]:
    found = regions_of("vm", HOLE, lambda one: BASE + one.offset, RAM, maps)
    return [(region.first, region.pages, region.hva, region.offset) for region in found]


def test_pages_are_numbered_over_the_hole() -> None:
    expected = [(0, 524288, BASE, 0), (524288, 262144, BASE + (2 << 30), 2 << 30)]
    assert regions([mapping(BASE, BASE + (3 << 30))]) == expected
    # Registering a part with a userfaultfd cuts a mapping in two.
    cut = BASE + (1 << 30)
    assert regions([mapping(BASE, cut), mapping(cut, BASE + (3 << 30), 1 << 30)]) == expected


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        ([mapping(BASE, BASE + (3 << 30), inode=0, permissions="rw-p")], "anonymous-memory"),
        ([mapping(BASE, BASE + (3 << 30), permissions="rw-p")], "not-shared"),
        ([mapping(BASE, BASE + 4096), mapping(BASE + 4096, BASE + (3 << 30), 4096, permissions="rw-p")], "not-shared"),
        ([mapping(BASE, BASE + 4096), mapping(BASE + 4096, BASE + (3 << 30), 4096, inode=10)], "not-shared"),
        ([mapping(BASE, BASE + 4096), mapping(BASE + 4096, BASE + (3 << 30), 8192)], "not-shared"),
        (
            [mapping(BASE, BASE + 4096), mapping(BASE + 4096, BASE + (3 << 30), 0, permissions="rw-p", inode=10)],
            "sharing",
        ),
    ],
)
def test_memory_that_is_not_one_shared_file(maps: list[Mapping], reason: str) -> None:
    with pytest.raises(RefusedError) as caught:
        regions(maps)
    assert caught.value.reason == reason


def test_addresses_that_the_kernel_does_not_know() -> None:
    with pytest.raises(PeerError, match="no mapping there"):
        regions([])
    with pytest.raises(PeerError, match="goes on at"):
        regions([mapping(BASE, BASE + (1 << 30))])


def test_a_vm_without_ram() -> None:
    with pytest.raises(RefusedError) as caught:
        regions_of("vm", [], lambda _one: 0, {}, [])
    assert caught.value.reason == "no-ram"
