"""On which node each unit of a running guest's memory is, and moving units from outside, move_pages(2).

The kernel moves what is in the page tables, and tells the node of that only: a page that has content but is mapped no
longer, as after a trace, is mapped first, by reading a byte of it. That is done when its turn has come, so that what
goes first waits for nothing else. What has no memory, or is in a store, is on no node and stays out of this.

A unit is a page, or 512 of them where memory is in large pages; a large page moves whole when any of its pages does.
"""

from __future__ import annotations

import errno
import time

import numpy as np
from numpy.typing import NDArray

from outboard.errors import NotFoundError
from outboard.linux import nodes as sysfs
from outboard.linux import numa, process_vm
from outboard.linux.pagemap import Pagemap
from outboard.numa.policies import ABSENT
from outboard.pages import LARGE, PAGE_SIZE
from outboard.trace.accesses import exclude_others
from outboard.vmm.guest import Guest
from outboard.vmm.large_pages import large_mappings

_AT_ONCE = 1 << 18
_RESERVE = 0.02
"""The part of a node's memory that is left to others: below it the kernel itself begins to look for memory."""


def unit_of(guest: Guest) -> int:
    """How many pages are best moved as one: 512 where most of the memory is in large pages.

    :raise KernelError: the process has ended.
    """
    if all(region.page_size > PAGE_SIZE for region in guest.regions):
        return LARGE
    return LARGE if 2 * len(large_mappings(guest)) > guest.pages else 1


def free_of(node: int) -> int:
    """Bytes of a node that can be taken.

    :raise NotFoundError: this host has no such node, or it has no memory.
    """
    found = sysfs.nodes()
    for one in found:
        if one.number == node and one.memory:
            return max(0, one.free - int(_RESERVE * one.memory))
    have = ", ".join(str(one.number) for one in found if one.memory) or "0"
    raise NotFoundError(f"this host has no node {node} with memory: it has {have}; outboard numa topology shows them")


def backends(guest: Guest, per: int) -> dict[str, NDArray[np.bool_]]:
    """Which units are of each memory backend of a guest, in the order of the guest's addresses.

    A VM of several nodes of its own has a backend for each, and QEMU lays them out in the order of the nodes.
    """
    firsts = np.minimum(np.arange(0, guest.pages, per), guest.pages - 1)
    starts = np.array([region.first for region in guest.regions])
    region = np.searchsorted(starts, firsts, side="right") - 1
    found: dict[str, NDArray[np.bool_]] = {}
    for number, one in enumerate(guest.regions):
        found[one.memdev] = found.get(one.memdev, False) | (region == number)
    return found


class Whereabouts:
    """The memory of a guest, by unit; nobody may trace its accesses meanwhile.

    :raise RefusedError: ``traced``: somebody does.
    :raise KernelError: the process has ended.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest, per: int) -> None:
        self._guest, self.per = guest, per
        self.units = -(-guest.pages // per)
        self.unit_bytes = per * PAGE_SIZE
        # Of a page of hugetlbfs the kernel wants to be told once.
        self._named = 1 if all(region.page_size > PAGE_SIZE for region in guest.regions) else per
        self._firsts: NDArray[np.int64] = np.array([region.first for region in guest.regions], dtype=np.int64)
        self._bases: NDArray[np.int64] = np.array(
            [region.hva - region.first * PAGE_SIZE for region in guest.regions], dtype=np.int64
        )
        self._node = next((one.number for one in sysfs.nodes() if one.memory), 0)
        self._content: NDArray[np.bool_] | None = None
        self._pagemap = Pagemap(guest.pid)
        try:
            exclude_others(guest, self._pagemap)
        except BaseException:
            self._pagemap.close()
            raise

    def _addresses(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        region = np.searchsorted(self._firsts, pages, side="right") - 1
        return np.asarray(self._bases[region] + pages * PAGE_SIZE, dtype=np.int64)

    def _pages(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pages to name to the kernel, a row for each unit; the last unit's last page is named again."""
        pages = units[:, None] * self.per + np.arange(self._named)
        return np.asarray(np.minimum(pages, self._guest.pages - 1), dtype=np.int64)

    def _asked(self, units: NDArray[np.int64]) -> NDArray[np.int32]:
        """The node of each page named, a row for each unit; a negated errno where there is none."""
        pages = self._pages(units)
        return numa.nodes_of_pages(self._guest.pid, self._addresses(pages.reshape(-1))).reshape(pages.shape)

    def nodes(self, units: NDArray[np.int64] | None = None, *, mapping: bool = True) -> NDArray[np.int16]:
        """The node of each unit, or of some: where most of it is.

        :param mapping: map first what has content and is not in the page tables; otherwise it counts as on no node.
        :raise KernelError: the process has ended; ENOSYS: the kernel has no NUMA.
        """
        asked = np.arange(self.units, dtype=np.int64) if units is None else units
        found: NDArray[np.int16] = np.full(asked.size, ABSENT, dtype=np.int16)
        step = max(1, _AT_ONCE // self._named)
        for first in range(0, asked.size, step):
            part = asked[first : first + step]
            rows = self._asked(part)
            lacking = np.flatnonzero((rows < 0).any(axis=1)) if mapping else part[:0]
            if lacking.size and self._map(self._pages(part[lacking])[rows[lacking] < 0]):
                rows[lacking] = self._asked(part[lacking])
            found[first : first + step] = _most(rows)
        return found

    def _map(self, pages: NDArray[np.int64]) -> int:
        """Map those of some pages that have content; how many these are."""
        if self._content is None:
            # What gets content later is mapped by whoever writes it, and no trace takes that away.
            self._content = self._guest.memory.populated().mask()
        return process_vm.touch(self._guest.pid, self._addresses(pages[self._content[pages]]))

    def move(self, units: NDArray[np.int64], node: int) -> tuple[NDArray[np.int32], float]:
        """Move units to a node; where each is now, or a negated errno, and how long that took.

        Whoever touches one of them meanwhile waits at most that long.

        :raise KernelError: as :func:`outboard.linux.numa.move_pages`.
        """
        addresses = self._addresses(self._pages(units).reshape(-1))
        self._node = node
        began = time.perf_counter()
        status = numa.move_pages(self._guest.pid, addresses, node)
        took = time.perf_counter() - began
        if self._named == 1:
            return status, took
        # Of a large page the first that was named took the others along, whatever is said of them.
        rows = self._asked(units)
        there = ((rows == node) | (rows == -errno.ENOENT)).all(axis=1)
        return np.where(there, node, np.minimum(status.reshape(rows.shape).min(axis=1), -errno.EBUSY)), took

    def overhead(self) -> float:
        """Seconds that a call takes which moves nothing: before it moves anything, the kernel has each processor give
        up the pages that it holds in batches.

        :raise KernelError: as :meth:`move`.
        """
        address = np.zeros(1, dtype=np.int64)
        began = time.perf_counter()
        numa.move_pages(self._guest.pid, address, int(self._node))
        return time.perf_counter() - began

    def close(self) -> None:
        """Idempotent."""
        self._pagemap.close()

    def __enter__(self) -> Whereabouts:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _most(rows: NDArray[np.int32]) -> NDArray[np.int16]:
    """The node that most of each row is on."""
    if rows.shape[1] == 1:
        return np.where(rows[:, 0] < 0, ABSENT, rows[:, 0]).astype(np.int16)
    best: NDArray[np.int64] = np.zeros(len(rows), dtype=np.int64)
    found: NDArray[np.int16] = np.full(len(rows), ABSENT, dtype=np.int16)
    for node in np.unique(rows[rows >= 0]).tolist():
        count = (rows == node).sum(axis=1)
        found[count > best] = node
        best = np.maximum(best, count)
    return found
