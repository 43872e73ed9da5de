"""What the bulk has packed, back into pages."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.pages import PAGE_SIZE
from outboard.pages.kept import KEEP, PLAIN, RECALL, KeptPages
from outboard.stores.disk import DiskStore
from outboard.wire.frames import MAX_PAGES, Pages
from outboard.wire.packed import SLOTS, Form, Packed

assert (Form.FULL, Form.KEPT, Form.SAME) == (PLAIN, KEEP, RECALL)  # a page's form is what is to be done for it


class Bases(Protocol):
    """What is to be seen of :class:`outboard.pager.arriving.ArrivingMemory`."""

    def held(self, page: int, into: memoryview) -> bool:
        """Read a page that was placed and that nobody has written since; False: there is no such thing."""


class Unpacker:
    """Unpacks the frames of one stream, in order.

    :param bases: what has changed of a page is applied to what it holds there.
    :param disks: the images of the VM that are to be referred to; None: there are none.

    ``refused`` are the pages that were sent as blocks and could not be read, and ``read_ns`` what reading blocks has
    taken; both for whoever takes them away from there.

    Synchronization: the stream's receiver.
    """

    def __init__(self, bases: Bases, disks: DiskStore | None = None) -> None:
        self._bases = bases
        self._disks = disks
        self.refused: list[int] = []
        self.read_ns = 0
        self._kept = KeptPages(SLOTS)
        self._room: NDArray[np.uint8] = np.empty((MAX_PAGES, PAGE_SIZE), dtype=np.uint8)

    def pages(self, packed: Packed) -> Pages:
        """The pages of a frame; their content is good until the next call.

        :raise PeerError: the frame names a slot that holds nothing, or changes of a page that is not here or may have
            changed here.
        """
        zero = packed.forms == Form.ZERO
        if not np.any(packed.forms > Form.FULL):
            return Pages(packed.runs, zero, packed.content.reshape(-1).data)
        forms = packed.forms[~zero]
        room = self._room[: forms.size]
        empty = self._kept.follow(forms, packed.slots, packed.content, room)
        if empty is not None:
            raise PeerError(f"a PACKED frame names slot {empty}, in which nothing is kept")
        changed, blocks = np.flatnonzero(forms == Form.CHANGED), np.flatnonzero(forms == Form.BLOCK)
        if changed.size or blocks.size:
            numbers = np.concatenate([np.arange(first, first + count) for first, count in packed.runs])[~zero]
            for row, change in zip(changed.tolist(), packed.changes, strict=True):
                page = int(numbers[row])
                if not self._bases.held(page, room[row].data):
                    raise PeerError(f"a PACKED frame changes page {page}, of which nothing is here that it could know")
                room[row] ^= change
            if blocks.size and (missing := blocks[~self._read(packed.blocks, blocks, room)]).size:
                return self._without(packed.runs, zero, numbers[missing], np.delete(room, missing, axis=0))
        return Pages(packed.runs, zero, room.reshape(-1).data)

    def _read(self, found: NDArray[np.uint64], rows: NDArray[np.int64], room: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Read blocks, ``found``, into rows of ``room``; which of them are what they should be."""
        if self._disks is None:
            return np.zeros(rows.size, dtype=np.bool_)
        content: NDArray[np.uint8] = np.empty(rows.size * PAGE_SIZE, dtype=np.uint8)
        locators, digests = np.ascontiguousarray(found[:, 0]), np.ascontiguousarray(found[:, 1])
        began = time.monotonic_ns()
        sound = self._disks.read(locators, digests, content)
        self.read_ns += time.monotonic_ns() - began
        room[rows] = content.reshape(-1, PAGE_SIZE)
        return sound

    def _without(
        self,
        runs: list[tuple[int, int]],
        zero: NDArray[np.bool_],
        missing: NDArray[np.int64],
        content: NDArray[np.uint8],
    ) -> Pages:
        """The frame without pages that could not be read, which are noted."""
        self.refused += missing.tolist()
        gone = set(missing.tolist())
        # In the order of the frame, which need not be that of the pages.
        kept = [page for first, count in runs for page in range(first, first + count) if page not in gone]
        numbers = np.concatenate([np.arange(first, first + count) for first, count in runs])
        here = ~np.isin(numbers, missing)
        edges = [0, *(np.flatnonzero(np.diff(kept) != 1) + 1).tolist(), len(kept)] if kept else [0]
        left = [(kept[begin], end - begin) for begin, end in pairwise(edges)]
        return Pages(left, zero[here], content.reshape(-1).data)
