"""Slots of one page each, and what is known of them: which are taken, and the digest of what each holds.

Both arrays are mapped from a file, so that they outlive the process that writes them. ``taken`` is a convenience, not
the truth: after a crash the truth is which slots a residency refers to, and :meth:`Slots.retain` makes the one follow
from the other.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, OutboardError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests

_WINDOW = 1 << 14


class Slots:
    """``count`` slots, described by the file at ``path``, which is made if it is not there.

    :raise OutboardError: the file is there and describes another number of slots.
    :raise KernelError: it cannot be made or mapped.

    Synchronization: one process allocates; any frees. A byte is stored whole.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        size = count * 9
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                there = os.fstat(fd).st_size
                if there not in (0, size):
                    raise OutboardError(
                        f"{path} describes {there // 9} pages, not {count}; remove it if nothing in it is needed"
                    )
                os.ftruncate(fd, size)
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise KernelError(f"map of the slots' description {path}", error.errno or errno.EIO) from error
        self._digests: NDArray[np.uint64] = np.frombuffer(self._map, dtype="<u8", count=count)
        self._taken: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8, offset=count * 8)
        self._hand = 0

    def allocate(self, wanted: int) -> NDArray[np.uint64] | None:
        """Take ``wanted`` slots, in a row where there is room for that; None when so many are not free."""
        found: list[NDArray[np.int64]] = []
        missing = wanted
        for begin in (*range(self._hand, self.count, _WINDOW), *range(0, self._hand, _WINDOW)):
            free = np.flatnonzero(self._taken[begin : begin + _WINDOW] == 0)[:missing] + begin
            self._taken[free] = 1
            found.append(free)
            missing -= free.size
            if not missing:
                self._hand = int(found[-1][-1] + 1) % self.count if wanted else self._hand
                return np.concatenate(found).astype(np.uint64)
        self._taken[np.concatenate(found)] = 0
        return None

    def free(self, slots: NDArray[np.uint64]) -> None:
        """Give slots back; what they hold is lost."""
        self._taken[slots] = 0

    def retain(self, slots: NDArray[np.uint64]) -> None:
        """After a crash: exactly these are taken."""
        self._taken[:] = 0
        self._taken[slots] = 1

    def used(self) -> int:
        """How many slots are taken."""
        return int(np.count_nonzero(self._taken))

    def sign(self, slots: NDArray[np.uint64], content: NDArray[np.uint8]) -> None:
        """Note the digests of what is being put into ``slots``."""
        self._digests[slots] = page_digests(content)

    def verify(self, slots: NDArray[np.uint64], content: NDArray[np.uint8]) -> None:
        """Compare what came out of ``slots`` with what went in.

        :raise DamagedPageError: it is something else.
        """
        wrong = np.flatnonzero(page_digests(content) != self._digests[slots])
        if wrong.size:
            raise DamagedPageError(
                f"{wrong.size} of {slots.size} pages read from {self.path.with_suffix('')} are not what was put there, "
                f"the first is slot {slots[wrong[0]]} (byte {int(slots[wrong[0]]) * PAGE_SIZE})"
            )

    def close(self) -> None:
        """Let go of the file; what it says stays."""
        del self._digests, self._taken
        self._map.close()
