"""PageSet: a set of page numbers of one guest, a dense bitmap inside and runs outside.

One bit a page (32 KiB a GiB), little bit order, so that the bytes are what crosses the wire. Whole-set operations are
NumPy's; the loops that look for runs are numba's and release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

Runs = NDArray[np.int64]
"""Shape (n, 2): first page number and count of pages, ascending, no two adjacent."""

_EMPTY, _FULL = np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)


@njit("int64(uint8[::1], uint64[::1], int64, int64[:, ::1])", cache=True, nogil=True)
def _runs(bits: NDArray[np.uint8], words: NDArray[np.uint64], pages: int, out: Runs) -> int:
    found = 0
    inside = False
    page = 0
    while page < pages:
        if (page & 63) == 0 and page + 64 <= pages:
            word = words[page >> 6]
            if word == _FULL if inside else word == _EMPTY:
                page += 64
                continue
        byte = bits[page >> 3]
        if (page & 7) == 0 and page + 8 <= pages and ((byte == 0 and not inside) or (byte == 255 and inside)):
            page += 8
            continue
        if (byte >> (page & 7)) & 1:
            if not inside:
                inside = True
                if found < out.shape[0]:
                    out[found, 0] = page
        elif inside:
            inside = False
            if found < out.shape[0]:
                out[found, 1] = page - out[found, 0]
            found += 1
        page += 1
    if inside:
        if found < out.shape[0]:
            out[found, 1] = pages - out[found, 0]
        found += 1
    return found


@njit("void(uint8[::1], uint64[::1], int64[::1])", cache=True, nogil=True)
def _numbers(bits: NDArray[np.uint8], words: NDArray[np.uint64], out: NDArray[np.int64]) -> None:
    found = 0
    for word in range(words.size + 1):
        if word < words.size and words[word] == _EMPTY:
            continue
        for index in range(word * 8, min(word * 8 + 8, bits.size)):
            byte = bits[index]
            page = index * 8
            while byte:
                if byte & 1:
                    out[found] = page
                    found += 1
                byte >>= 1
                page += 1


@njit("void(uint8[::1], int64[::1])", cache=True, nogil=True)
def _mark_each(bits: NDArray[np.uint8], pages: NDArray[np.int64]) -> None:
    for page in pages:
        bits[page >> 3] |= np.uint8(1 << (page & 7))


@njit("void(uint8[::1], int64[:, ::1], boolean)", cache=True, nogil=True)
def _mark(bits: NDArray[np.uint8], runs: Runs, present: bool) -> None:
    for index in range(runs.shape[0]):
        page = runs[index, 0]
        end = page + runs[index, 1]
        while page < end:
            if (page & 7) == 0 and page + 8 <= end:
                bits[page >> 3 : end >> 3] = 255 if present else 0
                page = end & ~7
            else:
                bit = np.uint8(1 << (page & 7))
                if present:
                    bits[page >> 3] |= bit
                else:
                    bits[page >> 3] &= ~bit
                page += 1


class PageSet:
    """A set of page numbers in ``[0, pages)``.

    :param pages: how many pages the guest has.
    :param bits: the bitmap to take over, ``ceil(pages / 8)`` bytes; empty when not given.
    :raise ValueError: the bitmap has another length, or bits beyond the last page.

    Synchronization: none; a set belongs to one thread.
    """

    __slots__ = ("_bits", "pages")

    def __init__(self, pages: int, bits: NDArray[np.uint8] | None = None) -> None:
        length = (pages + 7) // 8
        if bits is None:
            bits = np.zeros(length, dtype=np.uint8)
        elif bits.shape != (length,) or bits.dtype != np.uint8:
            raise ValueError(f"a bitmap of {pages} pages takes {length} bytes, got {bits.shape} of {bits.dtype}")
        elif pages & 7 and length and bits[-1] >> (pages & 7):
            raise ValueError(f"the bitmap names pages beyond the last of {pages}")
        self.pages = pages
        self._bits = bits

    @classmethod
    def full(cls, pages: int) -> PageSet:
        """Every page."""
        return cls.from_runs(pages, np.array([[0, pages]], dtype=np.int64))

    @classmethod
    def from_runs(cls, pages: int, runs: Runs) -> PageSet:
        """The pages of ``runs`` (which may overlap and be unordered).

        :raise ValueError: a run leaves ``[0, pages)``.
        """
        made = cls(pages)
        made.add(runs)
        return made

    @classmethod
    def from_numbers(cls, pages: int, numbers: NDArray[np.integer]) -> PageSet:
        """The pages numbered in ``numbers``, any order, repeats allowed.

        :raise ValueError: a number leaves ``[0, pages)``.
        """
        if numbers.size and (int(numbers.min()) < 0 or int(numbers.max()) >= pages):
            raise ValueError(f"a page number outside [0, {pages})")
        made = cls(pages)
        _mark_each(made._bits, np.ascontiguousarray(numbers, dtype=np.int64))
        return made

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_]) -> PageSet:
        """The pages whose entry of ``mask`` (one a page) is true."""
        return cls(mask.size, np.packbits(mask, bitorder="little"))

    def mask(self) -> NDArray[np.bool_]:
        """One bool a page."""
        return np.unpackbits(self._bits, count=self.pages, bitorder="little").view(np.bool_)

    def numbers(self) -> NDArray[np.int64]:
        """The page numbers, ascending."""
        out: NDArray[np.int64] = np.empty(len(self), dtype=np.int64)
        _numbers(self._bits, self.words(), out)
        return out

    def runs(self) -> Runs:
        """The set as maximal runs."""
        out = np.empty((64, 2), dtype=np.int64)
        found = _runs(self._bits, self.words(), self.pages, out)
        if found > out.shape[0]:
            out = np.empty((found, 2), dtype=np.int64)
            _runs(self._bits, self.words(), self.pages, out)
        return out[:found]

    def bits(self) -> NDArray[np.uint8]:
        """The bitmap itself, little bit order: what crosses the wire."""
        return self._bits

    def words(self) -> NDArray[np.uint64]:
        """The bitmap again, 64 pages at a time; the last few pages are in none."""
        return self._bits[: self._bits.size // 8 * 8].view(np.uint64)

    def _checked(self, runs: Runs) -> Runs:
        runs = np.ascontiguousarray(runs, dtype=np.int64).reshape(-1, 2)
        if runs.size and (runs.min() < 0 or bool(np.any(runs[:, 1] > self.pages - runs[:, 0]))):
            raise ValueError(f"a run outside [0, {self.pages})")
        return runs

    def add(self, runs: Runs) -> None:
        """Put the pages of ``runs`` in.

        :raise ValueError: a run leaves ``[0, pages)``.
        """
        _mark(self._bits, self._checked(runs), True)

    def discard(self, runs: Runs) -> None:
        """Take the pages of ``runs`` out.

        :raise ValueError: a run leaves ``[0, pages)``.
        """
        _mark(self._bits, self._checked(runs), False)

    def whole(self, block: int) -> PageSet:
        """Of each aligned block of ``block`` pages (a multiple of 8) that is wholly in the set its pages; no others."""
        return self._by_block(block, np.bitwise_and, 0xFF)

    def widened(self, block: int) -> PageSet:
        """All pages of each aligned block of ``block`` pages (a multiple of 8) that has one of ours."""
        return self._by_block(block, np.bitwise_or, 0)

    def _by_block(self, block: int, combine: np.ufunc, nothing: int) -> PageSet:
        octets = block // 8
        blocks = -(-self._bits.size // octets)
        padded = np.full(blocks * octets, nothing, dtype=np.uint8)
        padded[: self._bits.size] = self._bits
        if nothing and self.pages & 7:
            padded[self._bits.size - 1] |= 0xFF << (self.pages & 7) & 0xFF
        of_block = combine.reduce(padded.reshape(blocks, octets), axis=1)
        kept = np.where(of_block == 0xFF, 0xFF, 0) if nothing else np.where(of_block != 0, 0xFF, 0)
        bits = np.repeat(kept.astype(np.uint8), octets)[: self._bits.size]
        if self.pages & 7 and bits.size:
            bits[-1] &= (1 << (self.pages & 7)) - 1
        return PageSet(self.pages, bits)

    def copy(self) -> PageSet:
        """Another set of the same pages."""
        return PageSet(self.pages, self._bits.copy())

    def _with(self, other: PageSet) -> NDArray[np.uint8]:
        if other.pages != self.pages:
            raise ValueError(f"sets of different guests: {self.pages} and {other.pages} pages")
        return other._bits

    def __or__(self, other: PageSet) -> PageSet:
        return PageSet(self.pages, self._bits | self._with(other))

    def __and__(self, other: PageSet) -> PageSet:
        return PageSet(self.pages, self._bits & self._with(other))

    def __sub__(self, other: PageSet) -> PageSet:
        return PageSet(self.pages, self._bits & ~self._with(other))

    def __invert__(self) -> PageSet:
        bits = ~self._bits
        if self.pages & 7:
            bits[-1] &= (1 << (self.pages & 7)) - 1
        return PageSet(self.pages, bits)

    def __len__(self) -> int:
        words = self.words()
        rest = self._bits[words.size * 8 :]
        return int(np.bitwise_count(words).sum(dtype=np.int64) + np.bitwise_count(rest).sum(dtype=np.int64))

    def __bool__(self) -> bool:
        return bool(self._bits.any())

    def __contains__(self, page: int) -> bool:
        return 0 <= page < self.pages and bool(self._bits[page >> 3] >> (page & 7) & 1)

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the runs as [first, count]."""
        yield from self.runs().tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageSet):
            return NotImplemented
        return self.pages == other.pages and bool(np.array_equal(self._bits, other._bits))

    __hash__ = None  # type: ignore[assignment]  # a mutable set

    def __repr__(self) -> str:
        return f"<PageSet of {len(self)} of {self.pages} pages>"


def shifted(runs: Runs, by: int) -> Runs:
    """The same runs, ``by`` pages further on."""
    return np.column_stack((runs[:, 0] + by, runs[:, 1]))


def chop(runs: Runs, most: int) -> Runs:
    """Cut ``runs`` so that none is longer than ``most`` pages; the order stays."""
    if not runs.size:
        return runs
    pieces = -(-runs[:, 1] // most)
    index = np.repeat(np.arange(len(runs)), pieces)
    ordinal = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = runs[index, 0] + ordinal * most
    count = np.minimum(most, runs[index, 0] + runs[index, 1] - first)
    return np.column_stack((first, count))
