"""Large mappings: which parts of a guest's memory one entry of a page table maps, 2 MiB at a time, and making more.

Sources: Documentation/admin-guide/mm/pagemap.rst (PAGE_IS_HUGE), process_madvise(2), madvise(2) (MADV_COLLAPSE).
"""

from __future__ import annotations

import numpy as np

from outboard.errors import KernelError
from outboard.linux import pidfd
from outboard.linux.pagemap import Category, Pagemap, has_pagemap_scan
from outboard.linux.process_madvise import Advice, advise
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest


def large_mappings(guest: Guest) -> PageSet:
    """The pages that large entries map; before Linux 6.7 only hugetlbfs is known to have them.

    :raise KernelError: the process has ended.
    """
    found = PageSet(guest.pages)
    scans = has_pagemap_scan()
    with Pagemap(guest.pid) as pagemap:
        for region in guest.regions:
            if scans:
                end = region.hva + region.pages * PAGE_SIZE
                wanted = Category.HUGE | Category.PRESENT
                ranges = pagemap.scan(region.hva, end, required=wanted, report=wanted)[:, :2].astype(np.int64)
                starts, ends = (ranges[:, side] - region.hva for side in (0, 1))
                found.add(np.column_stack((starts // PAGE_SIZE + region.first, (ends - starts) // PAGE_SIZE)))
            elif region.page_size > PAGE_SIZE:
                found.add(np.array([[region.first, region.pages]]))
    return found


def collapse(guest: Guest, blocks: PageSet) -> PageSet:
    """Have the kernel map each of ``blocks``, aligned 2 MiB each, by a large entry; those that it would not.

    What has no memory there gets some, of zeros. A thread that touches the block meanwhile waits, a millisecond where
    its small pages are copied together. Nothing is changed by trying.

    :raise KernelError: the process has ended.
    """
    refused = PageSet(guest.pages)
    process = pidfd.open(guest.pid)
    try:
        for first, count in blocks:
            for block in range(first, first + count, LARGE):
                region = next(one for one in guest.regions if block < one.first + one.pages)
                hva = region.hva + (block - region.first) * PAGE_SIZE
                try:
                    advise(process, [(hva, LARGE * PAGE_SIZE)], Advice.COLLAPSE)
                except KernelError:
                    if not pidfd.alive(guest.pid):
                        raise
                    refused.add(np.array([[block, LARGE]]))
    finally:
        pidfd.close(process)
    return refused
