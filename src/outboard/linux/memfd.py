"""memfd_create(2): files in memory without a name."""

from __future__ import annotations

import os
from enum import IntFlag


class HugePages(IntFlag):
    """MFD_HUGETLB with a page size."""

    MIB_2 = os.MFD_HUGETLB | 21 << 26
    GIB_1 = os.MFD_HUGETLB | 30 << 26


def create(name: str, size: int, huge: HugePages | None = None) -> int:
    """Make a file of ``size`` bytes; its name is seen in /proc only.

    :raise OSError: ENOMEM or ENOENT when there are no huge pages of that size.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | (huge or 0))
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd
