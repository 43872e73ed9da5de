"""How much of a guest's memory its disks hold, image by image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.blocks.match import Found, match
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.stores.disk import Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images, Left
from outboard.stores.images.layers import DiskSpec
from outboard.vmm.enlighten import PageClass
from outboard.vmm.guest import Guest


class ImageShare(msgspec.Struct, frozen=True):
    """What of the guest's memory equals blocks of one image; sizes in bytes.

    ``depth`` 0 is the top image of its disk. ``fixed``: nobody writes to it, so that a reference to it lasts; to one
    that the guest writes to it is true for an instant. ``index`` is the memory that its index takes, made in
    ``index_s`` seconds if it was not there (``built``).
    """

    disk: int
    depth: int
    path: str
    fixed: bool
    size: int
    blocks: int
    """That hold something, alike ones counted once."""
    matched: int
    index: int
    index_s: float
    built: bool


class ClassShare(msgspec.Struct, frozen=True):
    """The resident pages of what the guest says is one kind: how many of them a disk holds, or are zeros; bytes."""

    kind: str
    resident: int
    matched: int
    zero: int


class Shares(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.blocks.v1"):
    """Where a guest's resident memory is found: each page counts once; in bytes and seconds.

    ``free`` is what the guest itself holds free and nothing else counts, None where it was not asked; ``match_s`` is
    the time of reading and comparing alone.
    """

    vm: str
    memory: int
    resident: int
    matched: int
    fixed: int
    """Of ``matched``, in images that nobody writes to."""
    zero: int
    free: int | None
    unmatched: int
    images: list[ImageShare]
    left: list[Left]
    match_s: float
    seconds: float
    classes: list[ClassShare] = []
    """By :class:`~outboard.vmm.enlighten.PageClass`; empty where the guest was not asked."""


def shares(guest: Guest, disks: Sequence[DiskSpec], indexes: Path, classes: NDArray[np.uint8] | None) -> Shares:
    """Look up all of a guest's resident memory.

    :param indexes: the directory of the images' indexes, which are made where they lack.
    :param classes: the :class:`~outboard.vmm.enlighten.PageClass` of each page, if the guest was asked.
    :raise RefusedError, KernelError: an image cannot be read, or the guest.
    """
    began = time.monotonic()
    with Images(disks) as images:
        found, took = [], []
        for layer in images.layers:
            at = time.monotonic()
            found.append(index.open_index(layer, indexes))
            took.append(time.monotonic() - at)
        resident = guest.memory.populated()
        at = time.monotonic()
        result = match(guest, resident, Finder(images.files, [*found]))
        match_s = time.monotonic() - at
        counts = np.bincount(result.match.image, minlength=len(found)) * PAGE_SIZE
        told = [
            ImageShare(
                disk=layer.disk,
                depth=layer.depth,
                path=str(layer.path),
                fixed=layer.fixed,
                size=layer.size,
                blocks=one.keys.size,
                matched=int(count),
                index=one.size,
                index_s=seconds,
                built=one.built,
            )
            for layer, one, count, seconds in zip(images.layers, found, counts, took, strict=True)
        ]
        left = images.left
    other = resident - PageSet.from_numbers(guest.pages, result.match.pages)
    other = other - PageSet.from_numbers(guest.pages, result.zero)
    free = None if classes is None else PageSet.from_mask(classes == PageClass.FREE)
    idle = None if free is None else len(other & free) * PAGE_SIZE
    return Shares(
        vm=guest.name,
        memory=guest.pages * PAGE_SIZE,
        resident=len(resident) * PAGE_SIZE,
        matched=int(counts.sum()),
        fixed=sum(one.matched for one in told if one.fixed),
        zero=result.zero.size * PAGE_SIZE,
        free=idle,
        unmatched=len(other) * PAGE_SIZE - (idle or 0),
        images=told,
        left=left,
        match_s=match_s,
        seconds=time.monotonic() - began,
        classes=[] if classes is None else _by_class(classes, resident, result),
    )


def _by_class(classes: NDArray[np.uint8], resident: PageSet, found: Found) -> list[ClassShare]:
    counts = [
        np.bincount(classes[pages], minlength=len(PageClass)) * PAGE_SIZE
        for pages in (resident.numbers(), found.match.pages, found.zero)
    ]
    return [
        ClassShare(kind.name.lower().replace("_", " "), *(int(count[kind]) for count in counts)) for kind in PageClass
    ]
