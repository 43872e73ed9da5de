"""Which pages nobody has touched for a while: every mapping is dropped, and what is mapped again later was touched.

process_madvise(MADV_PAGEOUT) on shared memory without swap drops the page table entries and keeps the pages; whoever
touches one has it mapped again, for 5 to 10 us a page. No trap is recorded, so a page's many accesses cost one fault.
The kernel leaves a page mapped that it has just taken in and not yet put on a list, some tens on each processor: nobody
can say of those that they are idle.

Source: process_madvise(2), Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import numpy as np

from outboard.errors import RefusedError
from outboard.linux import pidfd, proc, process_madvise
from outboard.linux.pagemap import Category, Pagemap
from outboard.linux.process_madvise import Advice
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest


class IdleTrace:
    """Watches all of ``guest``'s memory from the start on.

    :raise RefusedError: ``swap``: this host has swap, to which the kernel would write the pages out.
    :raise KernelError: the process has ended.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest) -> None:
        if proc.meminfo()["SwapTotal"]:
            raise RefusedError(
                "swap",
                f"{guest.name}: its idle pages cannot be told where the host itself swaps; end that with swapoff -a",
            )
        self._guest = guest
        process = pidfd.open(guest.pid)
        try:
            ranges = [(region.hva, region.pages * PAGE_SIZE) for region in guest.regions]
            process_madvise.advise(process, ranges, Advice.PAGEOUT)
        finally:
            pidfd.close(process)

    def idle(self) -> PageSet:
        """The pages that have certainly not been touched so far.

        Source: PAGEMAP_SCAN, the pages that are not present in the page table.
        """
        touched = PageSet(self._guest.pages)
        with Pagemap(self._guest.pid) as pagemap:
            for region in self._guest.regions:
                end = region.hva + region.pages * PAGE_SIZE
                found = pagemap.scan(region.hva, end, required=Category.PRESENT, report=Category.PRESENT)
                spans = (found[:, :2].astype(np.int64) - region.hva) // PAGE_SIZE
                touched.add(np.column_stack((spans[:, 0] + region.first, spans[:, 1] - spans[:, 0])))
        return ~touched
