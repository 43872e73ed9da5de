"""fallocate(2): room in files, taken and given back."""

from __future__ import annotations

import ctypes

from outboard.errors import KernelError
from outboard.linux.libc import libc

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def _fallocate(operation: str, fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, mode, offset, length) < 0:
        raise KernelError(f"{operation} of {length} bytes at {offset}", ctypes.get_errno())


def punch(fd: int, offset: int, length: int) -> None:
    """Free the blocks behind a range, which reads as zeros afterwards and is unmapped everywhere."""
    _fallocate("fallocate(PUNCH_HOLE)", fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def allocate(fd: int, offset: int, length: int) -> None:
    """Take blocks for a range.

    :raise KernelError: ENOSPC.
    """
    _fallocate("fallocate", fd, 0, offset, length)
