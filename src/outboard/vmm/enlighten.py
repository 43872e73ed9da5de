"""Enlightenment: what a stock Linux guest says of its own pages, in the order in which a moved guest needs them.

The source is the guest's /proc/kpageflags, 64 bits a page frame, read through the guest agent. No kernel patch, no
agent of ours. What the guest says decides order and what is skipped, so a lie costs only the liar.

Three facts of the format matter. BUDDY is set on every page of a free block. LRU, ACTIVE and ANON are set on the head
of a compound page and count for its tails. The file ends before RAM does (the last 128 KiB), and the frames from
0xa0000 to 0xfffff are no RAM to the guest although QEMU has memory there: such pages are live, unflagged.

Sources: Documentation/admin-guide/mm/pagemap.rst, <linux/kernel-page-flags.h>.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.pages import PAGE_SIZE
from outboard.vmm import kpageflags
from outboard.vmm.guest import Guest
from outboard.vmm.guest_agent import GuestAgent, GuestAgentError

_LEGACY_HOLE = (0xA0000 // PAGE_SIZE, 0x100000 // PAGE_SIZE)


class PageClass(IntEnum):
    """What a page is to its guest, in the order of sending."""

    PAGE_TABLES = 0
    KERNEL = 1
    """Reserved at boot: kernel text and data."""
    SLAB = 2
    ACTIVE_ANON = 3
    ACTIVE_FILE = 4
    INACTIVE = 5
    OTHER = 6
    """Live, nothing more is known: kernel pages that carry no flag, and what the guest said nothing of."""
    FREE = 7


class Flag(IntEnum):
    """KPF_*: bit numbers."""

    REFERENCED = 2
    LRU = 5
    ACTIVE = 6
    SLAB = 7
    BUDDY = 10
    MMAP = 11
    ANON = 12
    COMPOUND_HEAD = 15
    COMPOUND_TAIL = 16
    HUGE = 17
    PGTABLE = 26
    RESERVED = 32


def _has(flags: NDArray[np.uint64], flag: Flag) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (flags & np.uint64(1 << flag)) != 0
    return found


def spread_heads(flags: NDArray[np.uint64], head: int = 0) -> NDArray[np.uint64]:
    """Give each compound tail its head's flags too.

    :param head: the flags of the last head before the first of ``flags``, for a block that began earlier.
    """
    tails = _has(flags, Flag.COMPOUND_TAIL)
    if not tails.any():
        return flags
    position = np.where(_has(flags, Flag.COMPOUND_HEAD), np.arange(flags.size), -1)
    latest = np.maximum.accumulate(position)
    of_head = np.where(latest >= 0, flags[np.maximum(latest, 0)], np.uint64(head))
    return np.where(tails, flags | of_head, flags)


def classify(flags: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The :class:`PageClass` of each frame.

    :param flags: as /proc/kpageflags has them, heads spread.
    :return: uint8 of the same length.
    """
    lru = _has(flags, Flag.LRU)
    active = lru & (_has(flags, Flag.ACTIVE) | _has(flags, Flag.REFERENCED))
    anon = _has(flags, Flag.ANON)
    # hugetlb pages are on no list; the mapped ones are what their owner reserved them for.
    hugetlb = _has(flags, Flag.HUGE) & _has(flags, Flag.MMAP)
    chosen = np.select(
        [
            _has(flags, Flag.PGTABLE),
            _has(flags, Flag.SLAB),
            _has(flags, Flag.RESERVED),
            (active & anon) | hugetlb,
            active,
            lru,
            _has(flags, Flag.BUDDY),
        ],
        [
            PageClass.PAGE_TABLES,
            PageClass.SLAB,
            PageClass.KERNEL,
            PageClass.ACTIVE_ANON,
            PageClass.ACTIVE_FILE,
            PageClass.INACTIVE,
            PageClass.FREE,
        ],
        default=PageClass.OTHER,
    )
    return chosen.astype(np.uint8)


def chunks(guest: Guest, agent: GuestAgent, *, deadline: float) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Ask the guest for the class of each of its pages, a piece at a time.

    :param deadline: on the monotonic clock; what has not been said by then is not waited for.
    :return: (first page number, class of it and those that follow it); pages that are in no piece are OTHER.
    :raise PeerError: the answer is no kpageflags, or the agent gives none. :raise UnreachableError: it is too slow, or
        gone.
    """
    ranges = [(region.gpa // PAGE_SIZE, region.pages) for region in guest.regions]
    told = head = 0
    try:
        for first, flags in kpageflags.read(agent, ranges, deadline=deadline):
            heads = np.flatnonzero(_has(flags, Flag.COMPOUND_HEAD))
            classes = classify(spread_heads(flags, head))
            head = int(flags[heads[-1]]) if heads.size else head
            yield from _place(guest, first, classes)
            told += flags.size
    except GuestAgentError as error:
        raise PeerError(f"{guest.name} tells nothing of its pages: {error}") from error
    if told == 0:
        raise PeerError(f"{guest.name} tells nothing of its pages: its {kpageflags.PATH} is empty")


def classes_of(guest: Guest, agent: Path, seconds: float) -> NDArray[np.uint8]:
    """The :class:`PageClass` of each page, as the guest tells it within so many seconds.

    :param agent: the socket of its guest agent.
    :raise PeerError, UnreachableError: as :func:`chunks`.
    """
    found: NDArray[np.uint8] = np.full(guest.pages, PageClass.OTHER, dtype=np.uint8)
    deadline = time.monotonic() + seconds
    with GuestAgent(agent, timeout=seconds) as asked:
        for first, classes in chunks(guest, asked, deadline=deadline):
            found[first : first + classes.size] = classes
    return found


def _place(guest: Guest, frame: int, classes: NDArray[np.uint8]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Cut the classes of the frames from ``frame`` on into runs of page numbers."""
    low, high = (max(0, edge - frame) for edge in _LEGACY_HOLE)
    classes[low:high] = PageClass.OTHER
    for region in guest.regions:
        begin = region.gpa // PAGE_SIZE
        first = max(begin, frame)
        end = min(begin + region.pages, frame + classes.size)
        if first < end:
            yield region.first + first - begin, classes[first - frame : end - frame]
