"""Labels: a byte for each page of a guest, asked and set by whole sets.

What processes say of pages to one another is in such arrays (:mod:`outboard.pages.shared`). A guest of a terabyte has
268 million, and nearly all of them are alike, so the loops go eight pages at a time and look closer only where a word
or a byte of the bitmap says that there is something: 6 GB/s of labels, a whole set of nothing in no time at all.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages.pageset import PageSet

Labels = NDArray[np.uint8]

_U1, _U8, _I8 = types.uint8[::1], types.uint64[::1], types.int64
_EACH = np.uint64(0x0101010101010101)
_LOW = np.uint64(0x7F7F7F7F7F7F7F7F)
_GATHER = np.uint64(0x0102040810204080)
_EMPTY = np.uint64(0)
_SEVEN, _TOP = np.uint64(7), np.uint64(56)


@njit(types.uint64(types.uint64, types.uint64), cache=True, nogil=True, inline="always")
def _equal(word: np.uint64, pattern: np.uint64) -> np.uint64:
    """A bit for each of eight labels: whether it is that of the pattern."""
    other = word ^ pattern
    # The top bit of each byte of the sum is set unless all seven bits below it are clear; no carry leaves a byte.
    clear = ~(((other & _LOW) + _LOW) | other | _LOW)
    return ((clear >> _SEVEN) * _GATHER) >> _TOP


@njit(types.void(_U1, _U8, types.uint8, types.boolean, _U1), cache=True, nogil=True)
def _find(labels: Labels, words: NDArray[np.uint64], value: int, wanted: bool, bits: NDArray[np.uint8]) -> None:
    pattern = np.uint64(value) * _EACH
    for index in range(words.size):
        found = np.uint8(_equal(words[index], pattern))
        bits[index] = found if wanted else ~found
    for page in range(words.size * 8, labels.size):
        if (labels[page] == value) == wanted:
            bits[page >> 3] |= np.uint8(1 << (page & 7))


@njit(_I8(_U1, _U8, types.uint8), cache=True, nogil=True)
def _count(labels: Labels, words: NDArray[np.uint64], value: int) -> int:
    pattern = np.uint64(value) * _EACH
    found = 0
    for index in range(words.size):
        same = _equal(words[index], pattern)
        while same:
            same &= same - np.uint64(1)
            found += 1
    for page in range(words.size * 8, labels.size):
        found += labels[page] == value
    return found


@njit(types.void(_U1, _U1, _U8, types.int64, types.uint8), cache=True, nogil=True)
def _put(labels: Labels, bits: NDArray[np.uint8], words: NDArray[np.uint64], old: int, new: int) -> None:
    for word in range(words.size + 1):
        if word < words.size and words[word] == _EMPTY:
            continue
        for index in range(word * 8, min(word * 8 + 8, bits.size)):
            byte = bits[index]
            page = index * 8
            while byte:
                if byte & 1 and (old < 0 or labels[page] == old):
                    labels[page] = new
                byte >>= 1
                page += 1


@njit(types.boolean(_U1, _U1, _U8, types.uint8), cache=True, nogil=True)
def _any(labels: Labels, bits: NDArray[np.uint8], words: NDArray[np.uint64], value: int) -> bool:
    for word in range(words.size + 1):
        if word < words.size and words[word] == _EMPTY:
            continue
        for index in range(word * 8, min(word * 8 + 8, bits.size)):
            byte = bits[index]
            page = index * 8
            while byte:
                if byte & 1 and labels[page] == value:
                    return True
                byte >>= 1
                page += 1
    return False


def words(octets: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The same bytes, eight at a time; the last few are in none."""
    return octets[: octets.size // 8 * 8].view(np.uint64)


def _fits(labels: Labels, pages: PageSet) -> None:
    if labels.size != pages.pages:
        raise ValueError(f"{labels.size} labels for a guest of {pages.pages} pages")


def labelled(labels: Labels, value: int, *, otherwise: bool = False) -> PageSet:
    """The pages whose label is ``value``, or is not (``otherwise``)."""
    bits: NDArray[np.uint8] = np.zeros((labels.size + 7) // 8, dtype=np.uint8)
    _find(labels, words(labels), value, not otherwise, bits)
    return PageSet(labels.size, bits)


def count(labels: Labels, value: int) -> int:
    """How many labels are ``value``."""
    return int(_count(labels, words(labels), value))


def put(labels: Labels, pages: PageSet, value: int, *, over: int | None = None) -> None:
    """Label ``pages``; with ``over`` only those of them that are labelled so.

    :raise ValueError: another guest's pages.
    """
    _fits(labels, pages)
    _put(labels, pages.bits(), pages.words(), -1 if over is None else over, value)


def any_labelled(labels: Labels, pages: PageSet, value: int) -> bool:
    """Whether one of ``pages`` is labelled ``value``.

    :raise ValueError: another guest's pages.
    """
    _fits(labels, pages)
    return bool(_any(labels, pages.bits(), pages.words(), value))
