"""FS_IOC_FIEMAP, <linux/fiemap.h>, Documentation/filesystems/fiemap.rst: which ranges of a file have blocks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntFlag

from outboard.linux.libc import Request, io_request, layout, u32, u64

_AT_ONCE = 128


class ExtentFlag(IntFlag):
    """FIEMAP_EXTENT_*."""

    LAST = 0x1
    UNKNOWN = 0x2
    DELALLOC = 0x4
    UNWRITTEN = 0x800
    """Has blocks, and reads as zeros."""
    SHARED = 0x2000
    """Its blocks belong to another file as well."""


@layout(32)
class fiemap(ctypes.Structure):
    """The request; the extents lie behind it."""

    fm_start: u64
    fm_length: u64
    fm_flags: u32
    fm_mapped_extents: u32
    fm_extent_count: u32
    fm_reserved: u32


@layout(56)
class fiemap_extent(ctypes.Structure):
    """One extent, in bytes."""

    fe_logical: u64
    fe_physical: u64
    fe_length: u64
    fe_reserved64_0: u64
    fe_reserved64_1: u64
    fe_flags: u32
    fe_reserved_0: u32
    fe_reserved_1: u32
    fe_reserved_2: u32


class _Asked(ctypes.Structure):
    """A request with room for its answer."""

    _fields_ = (("head", fiemap), ("extents", fiemap_extent * _AT_ONCE))


FS_IOC_FIEMAP = Request("FS_IOC_FIEMAP", io_request(3, ord("f"), 11, ctypes.sizeof(fiemap)), _Asked)


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes at ``offset`` of a file that have blocks."""

    offset: int
    length: int
    flags: ExtentFlag


def extents(fd: int, offset: int, length: int) -> list[Extent]:
    """The extents that lie in a range or reach into it, by offset; what is between them has no blocks.

    :raise KernelError: EOPNOTSUPP: the file system does not tell.
    """
    found: list[Extent] = []
    end = offset + length
    while offset < end:
        asked = _Asked()
        asked.head = fiemap(fm_start=offset, fm_length=end - offset, fm_extent_count=_AT_ONCE)
        FS_IOC_FIEMAP(fd, asked)
        count = asked.head.fm_mapped_extents
        for one in asked.extents[:count]:
            found.append(Extent(one.fe_logical, one.fe_length, ExtentFlag(one.fe_flags)))
        if count < _AT_ONCE or found[-1].flags & ExtentFlag.LAST:
            break
        offset = found[-1].offset + found[-1].length
    return found
