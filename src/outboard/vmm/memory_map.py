"""Where a guest's memory is: from QEMU itself (``info mtree -f``, ``gpa2hva``) and the kernel (/proc/PID/maps).

What the guest sees of its RAM changes while it runs: firmware maps ROM over it, the chipset hides a piece for system
management mode. The memory behind does not, so regions are taken as wide as the memory backend goes, and both ends of a
migration find the same ones, whatever their firmware has done so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from outboard.errors import PeerError, RefusedError
from outboard.linux.proc import Mapping
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Region

_RANGE = re.compile(
    r"^\s+(?P<start>[0-9a-f]{16})-(?P<end>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>[a-z/-]+)\): (?P<name>.+?)"
    r"(?: @(?P<offset>[0-9a-f]{16}))?(?: KVM)?$"
)
_VIEW = re.compile(r"^FlatView #\d+")
_SPACE = re.compile(r'^ AS "(?P<name>[^"]*)", root:')
_BLOCK = re.compile(r"^\s*(?P<name>\S.*?)\s+(?P<page>\d+) (?P<unit>[KMG]iB)\s+0x[0-9a-f]+ 0x(?P<used>[0-9a-f]+) 0x")
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class RamRange:
    """A range of guest-physical addresses that RAM answers; ``offset`` is inside the memory backend ``name``."""

    gpa: int
    size: int
    name: str
    offset: int


@dataclass(frozen=True, slots=True)
class Block:
    """One of QEMU's RAM blocks; bytes."""

    size: int
    page_size: int


def ram_ranges(mtree: str) -> list[RamRange]:
    """The RAM that the guest's processors see now, from the text of ``info mtree -f``.

    :raise PeerError: the text has no address space named "memory".
    """
    found: list[RamRange] = []
    here = seen = False
    for line in mtree.splitlines():
        if _VIEW.match(line):
            if seen:
                break
            here = False
        elif space := _SPACE.match(line):
            here = here or space["name"] == "memory"
            seen = seen or here
        elif here and (match := _RANGE.match(line)) and match["kind"] == "ram":
            gpa = int(match["start"], 16)
            offset = int(match["offset"] or "0", 16)
            found.append(RamRange(gpa, int(match["end"], 16) + 1 - gpa, match["name"], offset))
    if not seen:
        raise PeerError("QEMU's `info mtree -f` shows no address space named memory; its output has changed")
    return found


def blocks(ramblock: str) -> dict[str, Block]:
    """The RAM blocks by name, from the text of ``info ramblock``."""
    matches = (_BLOCK.match(line) for line in ramblock.splitlines())
    return {
        match["name"]: Block(int(match["used"], 16), int(match["page"]) * _UNITS[match["unit"]])
        for match in matches
        if match
    }


def widen(ranges: Iterable[RamRange], managed: dict[str, Block]) -> list[RamRange]:
    """The whole of each memory backend, as ranges that keep one distance between address and offset each.

    :param managed: the RAM blocks; a range of a block that is not in it is left out.
    """
    starts: dict[str, dict[int, int]] = {}
    for one in ranges:
        if one.name in managed:
            lowest = starts.setdefault(one.name, {})
            distance = one.gpa - one.offset
            lowest[distance] = min(lowest.get(distance, one.offset), one.offset)
    wide: list[RamRange] = []
    for name, lowest in starts.items():
        ordered = sorted(lowest.items(), key=lambda item: item[1])
        for index, (distance, offset) in enumerate(ordered):
            begin = offset if index else 0
            end = ordered[index + 1][1] if index + 1 < len(ordered) else managed[name].size
            wide.append(RamRange(begin + distance, end - begin, name, begin))
    return sorted(wide, key=lambda one: one.gpa)


def regions_of(
    guest: str,
    ranges: list[RamRange],
    hva_of: Callable[[RamRange], int],
    managed: dict[str, Block],
    maps: list[Mapping],
) -> tuple[Region, ...]:
    """Number the pages of ``ranges`` and find each in QEMU's address space.

    :param hva_of: where the start of a range is in QEMU's address space.
    :raise RefusedError: ``anonymous-memory``, ``not-shared``, ``no-ram``.
    """
    made: list[Region] = []
    first = 0
    for one in ranges:
        hva = hva_of(one)
        mapping = _mapping_at(guest, hva, one, maps)
        pages = one.size // PAGE_SIZE
        offset = mapping.offset + hva - mapping.start
        made.append(Region(first, pages, one.gpa, hva, offset, managed[one.name].page_size, one.name, mapping))
        first += pages
    if not made:
        raise RefusedError("no-ram", f"{guest}: QEMU shows no RAM that we could manage")
    return tuple(made)


def _mapping_at(guest: str, hva: int, one: RamRange, maps: list[Mapping]) -> Mapping:
    """The mapping at the start of a range, which is one piece of one file, into however many mappings it is cut."""
    holding = next((mapping for mapping in maps if mapping.start <= hva < mapping.end), None)
    if holding is None:
        raise PeerError(f"{guest}: QEMU says that {one.name} is at {hva:#x}, and the kernel has no mapping there")
    if holding.inode == 0:
        raise RefusedError(
            "anonymous-memory",
            f"{guest}: its memory {one.name} is anonymous, private to QEMU; start QEMU with "
            "-object memory-backend-file,share=on,mem-path=/dev/shm/NAME (or memory-backend-memfd,share=on)",
        )
    end = hva
    for mapping in maps:
        if mapping.start <= end < mapping.end and end < hva + one.size:
            if holding.shared and not mapping.shared and mapping.inode not in (0, holding.inode):
                raise RefusedError(
                    "sharing",
                    f"{guest}: pages of its memory {one.name} are shared, and mapped from elsewhere at "
                    f"{mapping.start:#x}; un-share them first, with outboard sharing stop",
                )
            if not mapping.shared or _place(mapping) != _place(holding):
                raise RefusedError(
                    "not-shared",
                    f"{guest}: its memory {one.name} is mapped privately at {mapping.start:#x}, so what the guest "
                    "writes is not in the file; add share=on to the memory backend",
                )
            end = mapping.end
    if end < hva + one.size:
        raise PeerError(f"{guest}: QEMU says that {one.name} goes on at {end:#x}, where the kernel has no mapping")
    return holding


def _place(mapping: Mapping) -> tuple[str, int, int]:
    """The same for all mappings of a file that keep one distance between address and offset."""
    return mapping.device, mapping.inode, mapping.start - mapping.offset
