"""What a VMM says of its memory, held against what the kernel knows of it.

The VMM may have been taken over by its guest. What it names is used with our privileges: its files are opened for
writing and holes are punched into them. So only what the VMM could do itself is accepted: a file must be mapped shared
and writable, which takes a descriptor open for writing, and it must still be that file when it has been opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from outboard.errors import PeerError
from outboard.linux import proc, statfs
from outboard.linux.proc import Mapping
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import GuestMemory, Region
from outboard.vmm.handoff import Claim

MAX_REGIONS = 64
"""Each may cost a descriptor for as long as the guest is attached. A VMM has a handful."""


def regions_of(
    claims: Iterable[Claim],
    mappings: list[Mapping],
    page_size_of: Callable[[Mapping], int],
    after: tuple[Region, ...] = (),
) -> tuple[Region, ...]:
    """Number the pages of ``claims`` by guest-physical address, and find each in the VMM's address space.

    :param page_size_of: bytes in a page of a mapping, for claims that do not tell.
    :param after: the memory that the guest has already; the numbers go on behind it.
    :raise PeerError: a claim lies outside the VMM's mappings, over another, or in a file that it may not write to.
    """
    made: list[Region] = []
    first = after[-1].first + after[-1].pages if after else 0
    for claim in sorted(claims, key=lambda one: one.gpa):
        mapping = _holding(claim, mappings)
        unit = claim.page_size or page_size_of(mapping)
        if claim.hva % unit or claim.size % unit:
            raise PeerError(f"{_words(claim)} is no whole pages of {unit} bytes, as its mapping has them")
        memdev = mapping.path or "anonymous"
        made.append(Region(first, claim.size // PAGE_SIZE, claim.gpa, claim.hva, claim.offset, unit, memdev, mapping))
        first += claim.size // PAGE_SIZE
    if len(after) + len(made) > MAX_REGIONS:
        raise PeerError(f"the VMM tells of {len(after) + len(made)} regions of memory; {MAX_REGIONS} is the most")
    _apart([*after, *made])
    return tuple(made)


def page_size_in(pid: int) -> Callable[[Mapping], int]:
    """How large the pages of a mapping of process ``pid`` are: as its file system says, where it is hugetlbfs.

    The answer raises PeerError for a mapping of anything but a plain file, and KernelError when it is gone.
    """

    def page_size_of(mapping: Mapping) -> int:
        if not mapping.inode:
            return PAGE_SIZE
        # O_PATH: to open a device would already do something.
        fd = proc.open_mapping(pid, mapping, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise PeerError(f"process {pid} maps {mapping.path!r} as guest memory, which is no plain file")
            kind = statfs.of(fd)
        finally:
            os.close(fd)
        return kind.block if kind.type == statfs.HUGETLBFS_MAGIC else PAGE_SIZE

    return page_size_of


def check_files(memory: GuestMemory) -> None:
    """See that the files that have been opened are those that were mapped when they were judged.

    :raise PeerError: the VMM has mapped another in between.
    """
    for region, fd in memory.files():
        found = os.fstat(fd)
        # With the device: inode numbers of a memfd can be had for the asking.
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        if region.has_file and (device, found.st_ino) != (region.mapping.device, region.mapping.inode):
            raise PeerError(f"the VMM mapped another file at {region.hva:#x} while its memory was looked at")


def _words(claim: Claim) -> str:
    return f"the VMM's memory of {claim.size} bytes at {claim.hva:#x} (guest-physical {claim.gpa:#x})"


def _holding(claim: Claim, mappings: list[Mapping]) -> Mapping:
    """The first of the mappings that hold a claim: all of one file, in one piece, or all of none."""
    pieces = list(_under(claim, mappings))
    held = pieces[0]
    shared = held.shared and held.inode != 0
    for piece in pieces:
        if piece.shared != held.shared or _place(piece) != _place(held):
            raise PeerError(f"{_words(claim)} is pieces of more than one file")
        if shared and "w" not in piece.permissions:
            raise PeerError(f"{_words(claim)} is in {piece.path!r}, which the VMM has not mapped for writing")
    offset = held.offset + claim.hva - held.start
    if shared and claim.offset != offset:
        raise PeerError(
            f"{_words(claim)} is said to be at {claim.offset:#x} of {held.path!r}; the kernel has it at {offset:#x}"
        )
    return held


def _under(claim: Claim, mappings: list[Mapping]) -> Iterator[Mapping]:
    """The mappings under a claim, which may be cut where their permissions or flags differ."""
    at = claim.hva
    for mapping in mappings:
        if at < claim.hva + claim.size and mapping.start <= at < mapping.end:
            yield mapping
            at = mapping.end
    if at < claim.hva + claim.size:
        raise PeerError(f"{_words(claim)} goes on at {at:#x}, where it has no mapping")


def _place(mapping: Mapping) -> tuple[str, int, int] | None:
    """The same for all mappings of a file that keep one distance between address and offset."""
    return (mapping.device, mapping.inode, mapping.start - mapping.offset) if mapping.inode else None


def _apart(regions: list[Region]) -> None:
    spans = [
        ("guest-physical addresses", [("", region.gpa, region) for region in regions]),
        ("addresses", [("", region.hva, region) for region in regions]),
        (
            "bytes of a file",
            [
                (f"{region.mapping.device} {region.mapping.inode}", region.offset, region)
                for region in regions
                if region.has_file
            ],
        ),
    ]
    for what, found in spans:
        ordered = sorted(found, key=lambda one: one[:2])
        for (space, low, one), (next_space, high, other) in pairwise(ordered):
            if space == next_space and low + one.pages * PAGE_SIZE > high:
                raise PeerError(
                    f"the VMM's memory at {one.hva:#x} and at {other.hva:#x} has {what} in common: a page would have "
                    "two numbers"
                )
