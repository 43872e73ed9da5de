"""Who writes: which threads are met writing to a sample of pages, watched for a moment.

The pages are write-protected with a userfaultfd of their own that tells the thread of each fault (Linux 4.14,
UFFD_FEATURE_THREAD_ID); a vCPU's thread is its own under KVM and under TCG. Each first write to a page waits for us
once, some hundred microseconds.

Source: userfaultfd(2).
"""

from __future__ import annotations

import select
import time
from collections import Counter
from dataclasses import replace

import numpy as np

from outboard.linux.userfaultfd import Fault, FaultFlag, Features, Mode
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest, Region

_BLOCK = 64
_BLOCKS = 8
_ENOUGH = 50
_FEATURES = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.THREAD_ID


def blocks_around(guest: Guest, pages: PageSet) -> tuple[Region, ...]:
    """Small pieces of ``guest``'s memory around some of ``pages``: at most eight of 256 KiB, or of a large page."""
    numbers = pages.numbers()
    if not len(numbers):
        return ()
    picked = np.unique(numbers[np.linspace(0, len(numbers) - 1, _BLOCKS).astype(np.int64)])
    blocks = []
    for region in guest.regions:
        per = max(_BLOCK, region.page_size // PAGE_SIZE)
        inside = picked[(picked >= region.first) & (picked < region.first + region.pages)] - region.first
        for start in np.unique(inside // per * per).tolist():
            octets = start * PAGE_SIZE
            blocks.append(
                replace(
                    region,
                    first=region.first + start,
                    pages=min(per, region.pages - start),
                    gpa=region.gpa + octets,
                    hva=region.hva + octets,
                    offset=region.offset + octets,
                )
            )
    return tuple(blocks)


def watch_writers(part: Guest, seconds: float) -> Counter[int]:
    """How many first writes each thread makes to ``part``, within ``seconds`` or until some hundred were met.

    :param part: a piece of a guest that no userfaultfd holds.
    :raise RefusedError, KernelError: as :meth:`~outboard.vmm.clamp.Clamp.inject`.
    """
    found: Counter[int] = Counter()
    clamp = Clamp.inject(part, _FEATURES, Mode.WP, outlives_us=False)
    try:
        for region in part.regions:
            clamp.uffd.write_protect(region.hva, region.pages * PAGE_SIZE)
        poll = select.poll()
        poll.register(clamp.uffd.fileno(), select.POLLIN)
        deadline = time.monotonic() + seconds
        while found.total() < _ENOUGH and (left := deadline - time.monotonic()) > 0:
            if not poll.poll(left * 1000):
                break
            for message in clamp.uffd.read():
                if isinstance(message, Fault) and message.flags & FaultFlag.WP:
                    found[message.thread] += 1
                    size = _page_size(part, message.address)
                    clamp.uffd.write_protect(message.address // size * size, size, protect=False)
    finally:
        clamp.release()
    return found


def _page_size(part: Guest, address: int) -> int:
    return next(
        region.page_size for region in part.regions if region.hva <= address < region.hva + region.pages * PAGE_SIZE
    )
