"""The pool of a sharing domain: the one copy of what several pages hold, in a file on tmpfs.

A slot is taken by whoever finds it free, which only the domain's own process decides; it is free again when no
residency of the domain's guests names it, which is asked of the residencies (:meth:`Pool.retain`) and never counted: a
count could be wrong after a crash. A free slot has no memory: its frame goes back to the kernel, and comes out zeroed.

Slots are taken at a random place, in a row where so many are free, so that pages that follow one another in a guest
follow one another in the pool and are one mapping. No guest can have its content put into a place, or a frame, that it
has chosen: the order in which slots are used is ours, and frames are the kernel's.

Contents are known by BLAKE3, keyed with a salt of the domain's that is made when its process starts and never leaves
it: a digest says nothing to whoever lacks the salt, and no one can prepare two pages that have the same.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from outboard.errors import KernelError, StoreFullError
from outboard.linux import fallocate
from outboard.pages import PAGE_SIZE

SLOTS = 1 << 24
"""64 GiB of different pages."""
_TRIES = 32


class Pool:
    """The pool in the file at ``path``, made if it is not there; what an earlier process left in it is kept.

    :param random: where slots are taken; :param salt: 32 bytes, of ``os.urandom`` when not given.
    :raise KernelError: it cannot be opened.

    Synchronization: one thread of one process takes and frees; others map it.
    """

    def __init__(self, path: Path, random: np.random.Generator, salt: bytes | None = None, slots: int = SLOTS) -> None:
        self._random = random
        # A descriptor's own path is a link by nature.
        flags = 0 if str(path).startswith("/proc/self/fd/") else os.O_NOFOLLOW
        self._salt = salt or os.urandom(32)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
            if os.fstat(self._fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it is somebody else's")
            os.ftruncate(self._fd, slots * PAGE_SIZE)
        except OSError as error:
            raise KernelError(f"opening the sharing pool {path}", error.errno or 0) from error
        self._taken: NDArray[np.bool_] = np.zeros(slots, dtype=np.bool_)
        self._by_content: dict[bytes, int] = {}
        self._content: dict[int, bytes] = {}

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Let go of it; what is mapped stays. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def digest(self, page: memoryview) -> bytes:
        """By what a content is known here."""
        return blake3(page, key=self._salt).digest(16)

    def find(self, digest: bytes) -> int:
        """The slot of a content; -1 where it is not here."""
        return self._by_content.get(digest, -1)

    def put(self, content: NDArray[np.uint8], digests: list[bytes]) -> NDArray[np.int64]:
        """Keep whole pages whose contents are not here yet; the slot of each.

        :raise StoreFullError: there is no room for all of them; none is kept.
        :raise KernelError: there is no memory for them.
        """
        slots = self._allocate(len(digests))
        data = content.data
        try:
            for at, count in _rows(slots):
                done = os.pwrite(self._fd, data[at * PAGE_SIZE : (at + count) * PAGE_SIZE], int(slots[at]) * PAGE_SIZE)
                if done != count * PAGE_SIZE:
                    raise StoreFullError(
                        f"the sharing pool took {done} bytes of {count * PAGE_SIZE}; there is no memory"
                    )
        except OSError as error:
            self._free(slots)
            raise KernelError("write to the sharing pool", error.errno or 0) from error
        except StoreFullError:
            self._free(slots)
            raise
        for digest, slot in zip(digests, slots.tolist(), strict=True):
            self._by_content[digest] = slot
            self._content[slot] = digest
        return slots

    def _allocate(self, count: int) -> NDArray[np.int64]:
        room = self._taken.size
        for _ in range(_TRIES):
            start = int(self._random.integers(0, max(1, room - count + 1)))
            if start + count <= room and not self._taken[start : start + count].any():
                slots = np.arange(start, start + count, dtype=np.int64)
                break
        else:
            free = np.flatnonzero(~self._taken)
            if free.size < count:
                raise StoreFullError(f"the sharing pool has {free.size} free slots of {room}, and {count} are needed")
            slots = np.sort(self._random.choice(free, count, replace=False))
        self._taken[slots] = True
        return slots

    def retain(self, slots: NDArray[np.int64]) -> int:
        """Keep exactly these, which residencies name, and free all others; how many were freed."""
        kept = np.zeros_like(self._taken)
        kept[slots] = True
        gone = np.flatnonzero(self._taken & ~kept)
        self._free(gone)
        unknown = np.flatnonzero(kept & ~self._taken)
        for slot in unknown.tolist():
            # Another process of this domain's put it here, under a salt that is gone with it.
            digest = self.digest(memoryview(os.pread(self._fd, PAGE_SIZE, slot * PAGE_SIZE)))
            self._by_content.setdefault(digest, slot)
            self._content[slot] = digest
        self._taken[unknown] = True
        return gone.size

    def _free(self, slots: NDArray[np.int64]) -> None:
        for slot in slots.tolist():
            digest = self._content.pop(slot, None)
            if digest is not None and self._by_content.get(digest) == slot:
                del self._by_content[digest]
        for at, count in _rows(slots):
            fallocate.punch(self._fd, int(slots[at]) * PAGE_SIZE, count * PAGE_SIZE)
        self._taken[slots] = False

    def used(self) -> int:
        """How many slots are taken."""
        return int(np.count_nonzero(self._taken))

    def slots(self) -> NDArray[np.int64]:
        """The slots that are taken, ascending."""
        return np.flatnonzero(self._taken)

    def read(self, slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        """What slots (ascending) hold.

        :raise KernelError: they cannot be read.
        """
        content = np.empty(slots.size * PAGE_SIZE, dtype=np.uint8)
        for at, count in _rows(slots):
            part = content.data[at * PAGE_SIZE : (at + count) * PAGE_SIZE]
            if os.preadv(self._fd, [part], int(slots[at]) * PAGE_SIZE) != part.nbytes:
                raise KernelError("read of the sharing pool", errno.EIO)
        return content


def _rows(slots: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Group ascending slots that follow one another: index of the first, how many."""
    if not slots.size:
        return []
    edges = np.concatenate(([0], np.flatnonzero(np.diff(slots) != 1) + 1, [slots.size]))
    return list(zip(edges[:-1].tolist(), np.diff(edges).tolist(), strict=True))
