"""ioctl_ficlonerange(2), <linux/fs.h>: one file's range made to share another's blocks."""

from __future__ import annotations

import ctypes

from outboard.linux.libc import Request, io_request, layout, s64, u64


@layout(32)
class file_clone_range(ctypes.Structure):
    """Which range of which file, and to where."""

    src_fd: s64
    src_offset: u64
    src_length: u64
    dest_offset: u64


FICLONERANGE = Request("FICLONERANGE", io_request(1, 0x94, 13, 32), file_clone_range)


def clone(source: int, source_offset: int, destination: int, offset: int, length: int) -> None:
    """Have ``length`` bytes at ``offset`` of file ``destination`` share the blocks of ``source``.

    What was allocated and never written is cloned as a hole.

    :raise KernelError: EOPNOTSUPP: the file system cannot; ENOSPC; EXDEV: another file system.
    """
    FICLONERANGE(
        destination,
        file_clone_range(src_fd=source, src_offset=source_offset, src_length=length, dest_offset=offset),
    )
