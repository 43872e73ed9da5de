"""memfd_create(2): files in memory without a name."""

from __future__ import annotations

import os
from enum import IntFlag

from outboard.errors import KernelError


class HugePages(IntFlag):
    """MFD_HUGETLB with a page size."""

    MIB_2 = os.MFD_HUGETLB | 21 << 26
    GIB_1 = os.MFD_HUGETLB | 30 << 26


def create(name: str, size: int, huge: HugePages | None = None) -> int:
    """Make a file of ``size`` bytes; its name is seen in /proc only.

    :raise KernelError: ENODEV: there are no huge pages of that size; EINVAL: ``size`` is no multiple of it.
    """
    operation = f"memfd_create of {name}, {size} bytes"
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | (huge or 0))
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise KernelError(operation, error.errno or 0) from error
    return fd
