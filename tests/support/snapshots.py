"""Snapshots of memory that tests make up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.snapshot.writing import SnapshotWriter
from outboard.stores.snapshot_format import Contents, Meta, Parent

SEED = 0x1234_5678_9ABC_DEF0


def name(number: int) -> str:
    """A snapshot's id."""
    return f"web-20260101T000000-{number:06x}"


def meta(number: int, pages: int, parent: Contents | None = None) -> Meta:
    """What is known of snapshot ``number``."""
    return Meta(
        id=name(number),
        vm="web",
        created=1.0,
        spec='name = "web"\nmemory = "1MiB"\n',
        running=True,
        layout=[(0, pages, 0)],
        seed=SEED,
        parent=None if parent is None else Parent(parent.meta.id, parent.digest),
    )


def write(
    directory: Path, number: int, memory: NDArray[np.uint8], parent: Contents | None = None, hot: tuple[int, ...] = ()
) -> Contents:
    """Make a snapshot of ``memory``; pages of ``hot`` come first."""
    pages = memory.size // PAGE_SIZE
    with SnapshotWriter(directory, name(number), pages, SEED, parent) as writer:
        first = np.array(hot, dtype=np.int64)
        rest = np.setdiff1d(np.arange(pages), first)
        for numbers in (first, *np.array_split(rest, 3)):
            content = np.ascontiguousarray(memory.reshape(-1, PAGE_SIZE)[numbers]).reshape(-1)
            writer.add(numbers.astype(np.int64), content, zero_pages(content), hot=numbers is first)
        return writer.finish(meta(number, pages, parent), b"devices")


def memory_of(pages: int, chance: np.random.Generator, kinds: int = 8) -> NDArray[np.uint8]:
    """Memory in which pages are zeros, the same as others, noise, or words."""
    found = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    for page in range(pages):
        match chance.integers(4):
            case 1:
                found[page] = chance.integers(kinds) + 1
            case 2:
                found[page] = chance.integers(0, 256, PAGE_SIZE, dtype=np.uint8)
            case 3:
                found[page, :64] = chance.integers(0, 256, 64, dtype=np.uint8)
    return found.reshape(-1)
