"""Processes of ours as members of a sharing domain, each with a pager in this process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.pager.overlay import Overlay
from outboard.pager.pager import Pager
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.large_pages import large_mappings
from tests.support.process_guest import guest_of
from tests.support.target import Target


class ProcessMember:
    """A target whose pages a pager keeps, in the files of ``directory``; ``pool`` is the domain's, a descriptor."""

    def __init__(self, name: str, directory: Path, pool: int, mebibytes: int = 4, target: Target | None = None) -> None:
        self.name = name
        self.target = target or Target(mebibytes=mebibytes)
        self.guest = guest_of(self.target)
        self.pages = self.guest.pages
        self._store = FileStore(directory / f"{name}-pool", self.pages)
        self._residency = Residency(self.pages)
        self.pager = Pager(self.guest, self._residency, {Where.POOL: self._store})
        self.overlay: Overlay = self.pager.share_from(pool)

    def take_over(self, pool: int) -> None:
        """Let go of the guest as it is, and take it again."""
        self.pager.close()
        self.pager = Pager(self.guest, self._residency, {Where.POOL: self._store})
        self.overlay = self.pager.share_from(pool)

    @property
    def where(self) -> NDArray[np.uint8]:
        return self.pager.residency.where

    @property
    def locator(self) -> NDArray[np.uint64]:
        return self.pager.residency.locator

    def regions(self) -> NDArray[np.int64]:
        return self.guest.memory.table()

    def populated(self) -> PageSet:
        return self.guest.memory.populated()

    def share(self, spans: NDArray[np.int64]) -> int:
        return len(self.overlay.share(spans))

    def drop_zeros(self, runs: Runs) -> int:
        return self.overlay.drop_zeros(PageSet.from_runs(self.pages, runs))

    def tidy(self) -> int:
        return self.overlay.unshare(self.overlay.copied())

    def large(self) -> PageSet:
        return large_mappings(self.guest)

    def rebuild(self, blocks: list[int]) -> int:
        rows = np.array([[block * LARGE, LARGE] for block in blocks], dtype=np.int64)
        return self.overlay.rebuild(PageSet.from_runs(self.pages, rows)) * LARGE

    def resident(self) -> int:
        """Pages of memory that are the guest's own: in its file, and copied."""
        return len(self.guest.memory.populated()) + len(self.overlay.copied())

    def fill(self, page: int, data: bytes) -> None:
        """Put something into a page, as the guest would before anybody manages it."""
        whole = data.ljust(PAGE_SIZE, b"\0")
        self.guest.memory.write(page, memoryview(whole))

    def close(self) -> None:
        self.target.__exit__(None, None, None)
        self.pager.close()
        self.guest.close()
        self._store.close()


def blocks_of(fd: int) -> int:
    """Bytes of memory that a file on tmpfs takes."""
    return os.fstat(fd).st_blocks * 512
