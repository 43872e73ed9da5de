"""Pages of a guest, found on its disks: by digest first, then byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests, zero_pages
from outboard.pages.pageset import PageSet, chop
from outboard.stores import disk
from outboard.stores.disk import Finder
from outboard.vmm.guest import Guest

_PART = 256
"""Pages to read at once."""


@dataclass(frozen=True, slots=True)
class BlockMatch:
    """Pages that equal blocks: for each the number of the image, of the block in that file, and the page's digest.

    It was true of the content as it was read. Whoever uses it later sees to it that the page has not been written
    since, or compares the digest.
    """

    pages: NDArray[np.int64]
    image: NDArray[np.uint16]
    block: NDArray[np.uint64]
    digest: NDArray[np.uint64]

    @property
    def locators(self) -> NDArray[np.uint64]:
        """As :class:`outboard.stores.disk.DiskStore` takes them."""
        return disk.locators(self.image, self.block)


@dataclass(frozen=True, slots=True)
class Found:
    """What :func:`match` has found; ``zero`` pages are all zeros, and on no disk for that."""

    match: BlockMatch
    zero: NDArray[np.int64]


def match(guest: Guest, pages: PageSet, finder: Finder) -> Found:
    """Look for ``pages`` on the disks of ``guest``.

    :param pages: none that is absent: it would be read, and read as zeros.
    :raise KernelError: they cannot be read.
    """
    buffer: NDArray[np.uint8] = np.empty(_PART * PAGE_SIZE, dtype=np.uint8)
    parts: list[tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.uint64], NDArray[np.uint64]]] = []
    zeros = [np.empty(0, dtype=np.int64)]
    for first, count in chop(pages.runs(), _PART).tolist():
        content = buffer[: count * PAGE_SIZE]
        guest.memory.read_into(first, content.data)
        zero = zero_pages(content)
        digests = page_digests(content)
        image, block = finder.find(content, digests, zero)
        found = image != disk.NONE
        numbers = np.arange(first, first + count)
        parts.append((numbers[found], image[found], block[found], digests[found]))
        zeros.append(numbers[zero])
    if not parts:
        parts.append((zeros[0], np.empty(0, np.uint16), np.empty(0, np.uint64), np.empty(0, np.uint64)))
    page, image, block, digest = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Found(BlockMatch(page, image, block, digest), np.concatenate(zeros))
