"""statfs(2), <sys/vfs.h>, <linux/magic.h>: which file system a file is on, and its unit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from outboard.errors import KernelError
from outboard.linux.libc import layout, libc, s64

TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
EXT4_SUPER_MAGIC = 0xEF53
XFS_SUPER_MAGIC = 0x58465342
BTRFS_SUPER_MAGIC = 0x9123683E


@layout(120)
class struct_statfs(ctypes.Structure):
    """struct statfs on x86-64; f_fsid is two ints."""

    f_type: s64
    f_bsize: s64
    f_blocks: s64
    f_bfree: s64
    f_bavail: s64
    f_files: s64
    f_ffree: s64
    f_fsid: s64
    f_namelen: s64
    f_frsize: s64
    f_flags: s64
    f_spare0: s64
    f_spare1: s64
    f_spare2: s64
    f_spare3: s64


@dataclass(frozen=True, slots=True)
class FileSystem:
    """``type`` is a magic number; ``block`` in bytes, on hugetlbfs the size of its pages."""

    type: int
    block: int


def of(fd: int) -> FileSystem:
    """The file system that an open file is on.

    :raise KernelError: EBADF.
    """
    found = struct_statfs()
    if libc.fstatfs(fd, ctypes.byref(found)) < 0:
        raise KernelError(f"fstatfs of descriptor {fd}", ctypes.get_errno())
    return FileSystem(found.f_type, found.f_bsize)
