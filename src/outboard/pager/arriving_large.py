"""Memory in large pages of hugetlbfs that arrives: the kernel enters 2 MiB at once, or nothing.

A large page therefore comes whole, in one frame, small pages of zeros inside it as bits, and is put together here. A
fault on any part of it asks for all of it. Before the guest runs, small pages of one that is present may come again.

Source: Documentation/admin-guide/mm/userfaultfd.rst, Documentation/mm/hugetlbfs_reserv.rst.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError, RefusedError
from outboard.linux.pagemap import Category, Pagemap
from outboard.linux.userfaultfd import Features
from outboard.pager.arriving import ArrivingMemory
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Where
from outboard.vmm.guest import Guest

_NOBODY = np.empty(0, dtype=np.int64)


class ArrivingLargeMemory(ArrivingMemory):
    """As :class:`~outboard.pager.arriving.ArrivingMemory`; ``where`` is the same for all of a large page."""

    unit = LARGE
    features = Features.MISSING_HUGETLBFS | Features.MINOR_HUGETLBFS | Features.THREAD_ID

    def place(self, runs: Runs, zero: NDArray[np.bool_], content: NDArray[np.uint8]) -> NDArray[np.int64]:
        index = at = 0
        met = []
        for first, count in runs.tolist():
            empty = zero[index : index + count]
            end = at + (count - int(np.count_nonzero(empty))) * PAGE_SIZE
            part = content[at:end]
            index, at = index + count, end
            whole = first % LARGE == 0 and count == LARGE
            present = self.residency.where[first] == Where.RESIDENT
            if present and not self.running:
                self._write_over(first, empty, part)
            elif not whole:
                raise PeerError(
                    f"{count} pages from page {first} on came, and {self.guest.name} is in large pages, of which this "
                    "one is not here yet"
                )
            elif not present:
                self._enter(first, empty, part)
            if whole and self.waiting[first]:
                met.append(first)
        return np.array(met, dtype=np.int64) if met else _NOBODY

    def _enter(self, first: int, empty: NDArray[np.bool_], content: NDArray[np.uint8]) -> None:
        if empty.all():
            self.residency.where[first : first + LARGE] = Where.ZERO
            self.ask_again(first)
            return
        if empty.any():
            content = _spread(empty, content)
        self._copy(first, content.ctypes.data)

    def _write_over(self, first: int, empty: NDArray[np.bool_], content: NDArray[np.uint8]) -> None:
        if empty.any():
            content = _spread(empty, content)
        self.guest.memory.write(first, content.data)

    def note_zero_set(self, pages: PageSet) -> None:
        # Of a large page that lives some small ones may not: they come with it.
        super().note_zero_set(pages.whole(LARGE))

    def forget(self, pages: PageSet) -> None:
        if len(pages.whole(LARGE)) != len(pages):
            raise PeerError(f"{self.guest.name} is in large pages, and a part of one was to be forgotten")
        super().forget(pages)

    def _present(self) -> PageSet:
        # hugetlbfs knows no holes (lseek SEEK_DATA); what we have entered is mapped.
        found = PageSet(self.guest.pages)
        with Pagemap(self.guest.pid) as pagemap:
            for region in self.guest.regions:
                end = region.hva + region.pages * PAGE_SIZE
                for start, stop, _ in pagemap.scan(region.hva, end, required=Category.PRESENT).tolist():
                    found.add(
                        np.array([[region.first + (start - region.hva) // PAGE_SIZE, (stop - start) // PAGE_SIZE]])
                    )
        return found


def _spread(empty: NDArray[np.bool_], content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pages with the empty ones in their places."""
    pages: NDArray[np.uint8] = np.zeros((empty.size, PAGE_SIZE), dtype=np.uint8)
    pages[~empty] = content.reshape(-1, PAGE_SIZE)
    return pages.reshape(-1)


def arriving_kind(guest: Guest) -> type[ArrivingMemory]:
    """What the memory of ``guest`` is when it arrives.

    :raise RefusedError: ``large-pages``: in pages of another size than 4 KiB and 2 MiB, or of several.
    """
    sizes = {region.page_size for region in guest.regions}
    if sizes == {PAGE_SIZE}:
        return ArrivingMemory
    if sizes == {LARGE * PAGE_SIZE} and all(
        region.first % LARGE == region.pages % LARGE == 0 for region in guest.regions
    ):
        return ArrivingLargeMemory
    raise RefusedError(
        "large-pages",
        f"{guest.name}: its memory is in pages of {', '.join(f'{size >> 10} KiB' for size in sorted(sizes))}; a VM is "
        "migrated whose memory is in pages of 4 KiB or of 2 MiB, all of one size",
    )
