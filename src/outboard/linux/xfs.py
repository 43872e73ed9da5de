"""ioctl_xfs_exchange_range(2), <xfs/xfs_fs.h>: the blocks of two ranges change places, holes included (Linux 6.10).

Either all of it is done or nothing, whoever dies meanwhile: the log sees to that. The file system must have been made
for it (``mkfs.xfs -i exchange=1``, xfsprogs 6.10).
"""

from __future__ import annotations

import ctypes
from typing import Annotated

from outboard.linux.libc import Request, io_request, layout, u32, u64

s32 = Annotated[int, ctypes.c_int32]


@layout(40)
class xfs_exchange_range(ctypes.Structure):
    """File 1 is named here, file 2 is the one that is asked."""

    file1_fd: s32
    pad: u32
    file1_offset: u64
    file2_offset: u64
    length: u64
    flags: u64


XFS_IOC_EXCHANGE_RANGE = Request("XFS_IOC_EXCHANGE_RANGE", io_request(1, ord("X"), 129, 40), xfs_exchange_range)


def exchange(one: int, one_offset: int, other: int, other_offset: int, length: int) -> None:
    """Have ``length`` bytes of two files change places, with their blocks.

    :raise KernelError: EOPNOTSUPP, ENOTTY: the file system cannot; ENOSPC: it has no room to do so in.
    """
    XFS_IOC_EXCHANGE_RANGE(
        other,
        xfs_exchange_range(file1_fd=one, file1_offset=one_offset, file2_offset=other_offset, length=length),
    )
