"""Digests of a guest's pages, by which equal ones are found.

Each page is digested with XXH3, 64 bits, under a secret of 192 random bytes that never leaves this host's memory, at
several times the speed of a cryptographic digest. That is a first pass and no more: it says which pages may be equal.
Whoever could make pages collide without knowing the secret would gain that pages are looked at once more, and found
different by keyed BLAKE3 and then byte for byte; two pages are never shared for having the same digest.

A page is *stable* when two scans in a row found the same digest: a page that is being written is not worth sharing.

Source: XXH3_64bits_withSecret of <xxhash.h>.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import native
from outboard.pages import PAGE_SIZE
from outboard.pages.content import xxh3_with_secret
from outboard.pages.pageset import PageSet, Runs, chop

SECRET = 192
"""Bytes; XXH3 wants 136 at least."""
CHUNK = 64
"""Pages read at once: a quarter of a megabyte stays in a processor's cache."""
NO_DIGEST = np.uint64(0)
"""What an absent page has; a page whose digest comes out so has 1."""


@njit("void(uint8[::1], uint8[::1], uint64[::1])", cache=True, nogil=True)
def _digest(pages: NDArray[np.uint8], secret: NDArray[np.uint8], out: NDArray[np.uint64]) -> None:
    for index in range(out.size):
        found = xxh3_with_secret(pages.ctypes.data + index * PAGE_SIZE, PAGE_SIZE, secret.ctypes.data, secret.size)
        out[index] = found if found else np.uint64(1)


@njit("int64(int64[:, ::1], int64[:, ::1], int64[::1], uint8[::1], uint8[::1], uint64[::1])", cache=True, nogil=True)
def _scan(
    regions: NDArray[np.int64],
    runs: Runs,
    rows: NDArray[np.int64],
    secret: NDArray[np.uint8],
    staging: NDArray[np.uint8],
    out: NDArray[np.uint64],
) -> int:
    for index in range(runs.shape[0]):
        first, count, row = runs[index, 0], runs[index, 1], rows[index]
        offset = regions[row, 3] + (first - regions[row, 0]) * PAGE_SIZE
        got = native.pread(regions[row, 4], staging.ctypes.data, count * PAGE_SIZE, offset)
        if got != count * PAGE_SIZE:
            return min(got, -5)
        for page in range(count):
            found = xxh3_with_secret(staging.ctypes.data + page * PAGE_SIZE, PAGE_SIZE, secret.ctypes.data, secret.size)
            out[first + page] = found if found else np.uint64(1)
    return 0


def digests(pages: NDArray[np.uint8], secret: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The digest of each of ``pages`` (whole pages, bytes)."""
    out = np.empty(pages.size // PAGE_SIZE, dtype=np.uint64)
    _digest(pages, secret, out)
    return out


@dataclass(frozen=True, slots=True)
class ScanStatistics:
    """``pages`` digested in all, in ``seconds`` of this thread's processor time; now ``stable``, of which ``zeros``."""

    pages: int
    seconds: float
    stable: int
    zeros: int

    @property
    def bytes_per_second(self) -> float:
        """Of guest memory, on one processor."""
        return self.pages * PAGE_SIZE / self.seconds if self.seconds else 0.0


class Digests:
    """The digests of the ``pages`` pages of one guest.

    :ivar now: by page; NO_DIGEST where nothing was to be read. :ivar stable: whether it was the same twice.

    Synchronization: one thread.
    """

    def __init__(self, pages: int, secret: NDArray[np.uint8]) -> None:
        self.now: NDArray[np.uint64] = np.zeros(pages, dtype=np.uint64)
        self.stable: NDArray[np.bool_] = np.zeros(pages, dtype=np.bool_)
        self._secret = secret
        self.of_zeros = digests(np.zeros(PAGE_SIZE, dtype=np.uint8), secret)[0]
        self._staging: NDArray[np.uint8] = np.empty(CHUNK * PAGE_SIZE, dtype=np.uint8)
        self._pages, self._seconds = 0, 0.0

    def scan(self, regions: NDArray[np.int64], pages: PageSet) -> None:
        """Digest ``pages``, all that have memory; all others have no digest.

        :param regions: as :meth:`outboard.vmm.guest.GuestMemory.table`.
        :raise KernelError: they cannot be read.
        """
        began = time.thread_time()
        runs, rows = cut(regions, pages.runs())
        fresh = np.zeros_like(self.now)
        answer = _scan(regions, runs, rows, self._secret, self._staging, fresh)
        if answer < 0:
            raise KernelError("read of a guest's memory, to digest it", -answer)
        self.stable = (fresh == self.now) & (fresh != NO_DIGEST)
        self.now = fresh
        self._pages += len(pages)
        self._seconds += time.thread_time() - began

    def forget(self) -> None:
        """No page has a digest: what is scanned next is as if it were scanned first."""
        self.now = np.full_like(self.now, NO_DIGEST)
        self.stable = np.zeros_like(self.stable)

    def zeros(self) -> PageSet:
        """The pages that were zeros, twice; to be looked at before anything is done to them."""
        return PageSet.from_mask(self.stable & (self.now == self.of_zeros))

    def statistics(self) -> ScanStatistics:
        """A frozen snapshot."""
        return ScanStatistics(self._pages, self._seconds, int(np.count_nonzero(self.stable)), len(self.zeros()))


def cut(regions: NDArray[np.int64], runs: Runs) -> tuple[Runs, NDArray[np.int64]]:
    """Runs cut at the edges of regions and to what is read at once, and the region of each."""
    pieces, rows = [np.empty((0, 2), dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for row, (first, count) in enumerate(regions[:, :2].tolist()):
        low = np.maximum(runs[:, 0], first)
        high = np.minimum(runs[:, 0] + runs[:, 1], first + count)
        inside = low < high
        here = chop(np.column_stack((low[inside], high[inside] - low[inside])), CHUNK)
        pieces.append(here)
        rows.append(np.full(len(here), row, dtype=np.int64))
    return np.ascontiguousarray(np.concatenate(pieces)), np.concatenate(rows)
