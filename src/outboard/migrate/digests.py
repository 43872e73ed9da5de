"""What both ends of a migration compare: the digest of each page that lives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest

_AT_ONCE = 256
"""Pages."""


def digests(guest: Guest, pages: PageSet) -> NDArray[np.uint64]:
    """The digest of each of ``pages``, ascending, read through the guest's files."""
    buffer: NDArray[np.uint8] = np.empty(_AT_ONCE * PAGE_SIZE, dtype=np.uint8)
    found: list[NDArray[np.uint64]] = []
    for first, count in pages:
        for at in range(0, count, _AT_ONCE):
            part = buffer[: min(_AT_ONCE, count - at) * PAGE_SIZE]
            guest.memory.read_into(first + at, part.data)
            found.append(page_digests(part))
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)
