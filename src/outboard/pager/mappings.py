"""A process's mappings: how many it may have, and which pages of its guest are mapped from elsewhere."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest, Region

_MADVICE = {"dc": mmap.MADV_DONTFORK, "dd": mmap.MADV_DONTDUMP, "hg": mmap.MADV_HUGEPAGE, "nh": mmap.MADV_NOHUGEPAGE}
"""Flags of a mapping, as smaps spells them, and the advice that sets them."""
_RESERVE = 4096
"""Mappings that are left to the VMM."""
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


def most_mappings() -> int:
    """How many mappings a process may have before the VMM would miss some."""
    return int(MAX_MAP_COUNT.read_text()) - _RESERVE


def advice_of(pid: int, region: Region) -> list[int]:
    """What has the kernel treat a mapping as it treats the region's first."""
    here = next(one for one in proc.maps(pid) if one.start <= region.hva < one.end)
    flags = proc.smaps(pid, here.start).get("VmFlags", "").split()
    return [advice for flag, advice in _MADVICE.items() if flag in flags]


def overlaid(guest: Guest) -> PageSet:
    """The pages of ``guest`` that are mapped from anything but its own file.

    Source: proc(5), /proc/PID/maps.

    :raise KernelError: the process has ended.
    """
    found = PageSet(guest.pages)
    maps = proc.maps(guest.pid)
    for region, fd in guest.memory.files():
        inode = os.fstat(fd).st_ino
        end = region.hva + region.pages * PAGE_SIZE
        for one in maps:
            low, high = max(one.start, region.hva), min(one.end, end)
            if low < high and not (one.shared and one.inode == inode):
                first = region.first + (low - region.hva) // PAGE_SIZE
                found.add(np.array([[first, (high - low) // PAGE_SIZE]], dtype=np.int64))
    return found
