"""Pages in a file: on a disk a plain swap file, on tmpfs the pool, which is memory that outlives whoever manages it.

Slots are handed out in a row where there is room, so that what is evicted together is one write, and can be one read.
``FILE.slots`` beside the file says which are taken. What leaves memory is signed: ``FILE.digests`` holds a digest for
each slot, and a page that does not come back as it went is not given out. Memory is trusted as the guest's own is: the
pool has no digests.

Source: pwrite(2), preadv(2).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, StoreFullError
from outboard.linux import statfs
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.pages.shared import file_array
from outboard.stores.slots import Slots
from outboard.stores.store import StoreStatistics


class FileStore:
    """``room`` pages in the file at ``path``, made if it is not there; a :class:`~outboard.stores.store.Store`.

    ``taken`` and ``digests`` (None on tmpfs) are the live arrays by slot, for the compiled fault path; so is ``lent``,
    by units of the file, where these may lie in the lender's file instead (empty here: nobody lends anything).

    :raise OutboardError: the file is there and was made for another number of pages.
    :raise KernelError: it cannot be opened.

    Synchronization: any thread.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.room = room
        slots, digests = _beside(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KernelError(f"open of the page file {path}", error.errno or errno.EIO) from error
        try:
            self._slots = Slots(slots, room)
            self.taken = self._slots.taken
            self.digests: NDArray[np.uint64] | None = None
            if statfs.of(self._fd).type != statfs.TMPFS_MAGIC:
                self.digests = file_array(digests, room, np.uint64)
        except BaseException:
            os.close(self._fd)
            raise
        self.lent: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._allocating = threading.Lock()
        self._put = self._fetched = 0

    def fileno(self) -> int:
        """The file: slot *n* is its page *n*."""
        return self._fd

    def lender(self) -> int:
        """The file in which lent units lie; -1: there is none."""
        return -1

    def trim(self) -> None:
        """Give back, to whom it came from, room that no page is in."""

    def put(self, content: NDArray[np.uint8], digests: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
        """See :meth:`Store.put`; a write that fails keeps nothing.

        :raise StoreFullError: no room in the file, or none on its disk.
        """
        count = content.size // PAGE_SIZE
        with self._allocating:
            slots = self._slots.allocate(count)
        if slots is None:
            raise StoreFullError(
                f"{self.path} has room for {self.room} pages, {self._slots.used()} of them taken; {count} more were "
                "to be put there"
            )
        if self.digests is not None:
            self.digests[slots] = page_digests(content) if digests is None else digests
        try:
            for first, begin, end in _rows(slots):
                part = content[begin * PAGE_SIZE : end * PAGE_SIZE]
                if os.pwrite(self._fd, part.data, first * PAGE_SIZE) != part.size:
                    # A short write is a full disk that has not said so yet.
                    raise OSError(errno.ENOSPC, "short write")
        except OSError as error:
            self._slots.free(slots)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(f"the disk of {self.path} is full: {count} pages stay in memory") from error
            raise KernelError(f"write of {count} pages to {self.path}", error.errno or errno.EIO) from error
        self._put += count
        return slots

    def fetch(self, locators: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        """See :meth:`Store.fetch`.

        :raise KernelError: the file cannot be read.
        """
        for first, begin, end in _rows(locators):
            part = into[begin * PAGE_SIZE : end * PAGE_SIZE]
            try:
                done = os.preadv(self._fd, [part.data], first * PAGE_SIZE)
            except OSError as error:
                raise KernelError(f"read of slot {first} of {self.path}", error.errno or errno.EIO) from error
            if done != part.size:
                raise DamagedPageError(f"{self.path} ends before slot {first + done // PAGE_SIZE}, which holds a page")
        if self.digests is not None:
            wrong = np.flatnonzero(page_digests(into[: locators.size * PAGE_SIZE]) != self.digests[locators])
            if wrong.size:
                raise DamagedPageError(
                    f"{wrong.size} of {locators.size} pages read from {self.path} are not what was put there, the "
                    f"first is slot {locators[wrong[0]]} (byte {int(locators[wrong[0]]) * PAGE_SIZE})"
                )
        self._fetched += locators.size

    def drop(self, locators: NDArray[np.uint64]) -> None:
        """See :meth:`Store.drop`."""
        self._slots.free(locators)

    def retain(self, locators: NDArray[np.uint64]) -> None:
        """See :meth:`Store.retain`."""
        self._slots.retain(locators)

    def statistics(self) -> StoreStatistics:
        """A frozen snapshot."""
        return StoreStatistics(self._slots.used(), self.room, self._put, self._fetched)

    def close(self) -> None:
        """Idempotent; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self.taken, self.digests, self._slots


def remove(path: Path) -> None:
    """Remove a store's file with what lies beside it. Idempotent."""
    for one in (path, *_beside(path)):
        one.unlink(missing_ok=True)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".slots"), path.with_name(path.name + ".digests")


def _rows(slots: NDArray[np.uint64]) -> Iterator[tuple[int, int, int]]:
    """Group slots that follow one another: (first slot, index of the first, index behind the last)."""
    if not slots.size:
        return
    edges = np.flatnonzero(np.diff(slots) != 1) + 1
    begins = [0, *edges.tolist()]
    for begin, end in zip(begins, [*begins[1:], slots.size], strict=True):
        yield int(slots[begin]), begin, end
