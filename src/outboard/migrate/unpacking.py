"""What the bulk has packed, back into pages."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.pages import PAGE_SIZE
from outboard.pages.kept import KEEP, PLAIN, RECALL, KeptPages
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

    Synchronization: the stream's receiver.
    """

    def __init__(self, bases: Bases) -> None:
        self._bases = bases
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
        changed = np.flatnonzero(forms == Form.CHANGED)
        if changed.size:
            numbers = np.concatenate([np.arange(first, first + count) for first, count in packed.runs])[~zero]
            for row, change in zip(changed.tolist(), packed.changes, strict=True):
                page = int(numbers[row])
                if not self._bases.held(page, room[row].data):
                    raise PeerError(f"a PACKED frame changes page {page}, of which nothing is here that it could know")
                room[row] ^= change
        return Pages(packed.runs, zero, room.reshape(-1).data)
