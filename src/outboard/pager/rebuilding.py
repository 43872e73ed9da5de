"""Rebuilding large mappings at the destination: a process that looks for blocks whose small pages have all arrived.

Pages are placed 4 KiB at a time, which is what answers a fault soonest. Where the source had a large mapping, the block
gets one here too once all of it is there, small pages of zeros filled in: what reads as zeros without having memory
cannot be part of a large page. A large page of hugetlbfs that holds nothing but zeros gets its memory again.
"""

from __future__ import annotations

import select
import socket
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import sched
from outboard.pager.arriving import ArrivingMemory
from outboard.pages import LARGE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.pages.shared import file_array
from outboard.vmm.large_pages import collapse, large_mappings

_LOOK_MS = 50
_NO, _WANTED, _DONE = range(3)


class Rebuilding:
    """The large mappings that ``memory`` is to have again.

    :param journal: a directory, where a successor finds out which those are.

    Synchronization: :meth:`want` in the engine's main process, :meth:`serve` in one that it has forked.
    """

    def __init__(self, memory: ArrivingMemory, journal: Path) -> None:
        self._memory = memory
        self._blocks: NDArray[np.uint8] = file_array(journal / "large", memory.guest.pages // LARGE, np.uint8)

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool((self._blocks == _WANTED).any())

    @property
    def wanted(self) -> bool:
        """Whether there was ever anything to do."""
        return bool(self._blocks.any())

    def want(self, pages: PageSet) -> None:
        """Rebuild those of ``pages`` that are whole blocks."""
        self._blocks[pages.whole(LARGE).mask()[::LARGE][: self._blocks.size]] = _WANTED

    def serve(self, link: socket.socket) -> None:
        """Rebuild what is complete, again and again, until told to stop."""
        # It is in no hurry, and shares the processors with the guest.
        sched.favour_this_process(0)
        poll = select.poll()
        poll.register(link, select.POLLIN)
        while not poll.poll(_LOOK_MS):
            for block in self._complete().tolist():
                if poll.poll(0):
                    return
                self._rebuild(block)

    def finish(self) -> None:
        """Rebuild what is left, once nothing is missing."""
        for block in self._complete().tolist():
            self._rebuild(block)

    def count(self) -> int:
        """How many large mappings there are, once the memory is the VMM's own; what could not be before is rebuilt."""
        guest = self._memory.guest
        # The guest runs, and nobody waits for this.
        sched.favour_this_process(0)
        if self._memory.unit == 1:
            wanted = np.flatnonzero(self._blocks != _NO) * LARGE
            blocks = PageSet.from_runs(guest.pages, np.column_stack((wanted, np.full(wanted.size, LARGE))))
            # A block without any memory is refused; with one page of zeros it is not.
            empty = collapse(guest, blocks - large_mappings(guest)) - guest.memory.populated().widened(LARGE)
            for first in empty.numbers()[::LARGE].tolist():
                guest.memory.allocate(first, 1)
            collapse(guest, empty)
        return len(large_mappings(guest)) // LARGE

    def _complete(self) -> NDArray[np.int64]:
        where = self._memory.residency.where
        wanted = np.flatnonzero(self._blocks == _WANTED)
        # Until the guest runs, what is zeros now may yet come with content, and we would be in the way of that.
        known = [Where.RESIDENT, Where.ZERO] if self._memory.running else [Where.RESIDENT]
        here = [block for block in wanted if np.isin(where[block * LARGE : (block + 1) * LARGE], known).all()]
        return np.array(here, dtype=np.int64)

    def _rebuild(self, block: int) -> None:
        memory, first = self._memory, block * LARGE
        for page in np.flatnonzero(memory.residency.where[first : first + LARGE : memory.unit] == Where.ZERO).tolist():
            memory.place_zero(first + page * memory.unit)
        if memory.unit == 1:
            try:
                collapse(memory.guest, PageSet.from_runs(memory.guest.pages, np.array([[first, LARGE]])))
            except KernelError:
                # The VMM has ended, which whoever forked us knows as well.
                return
        # Whether or not it would: it is tried once more at the end.
        self._blocks[block] = _DONE
