"""What pages hold: which are all zeros, and digests to compare them by."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from llvmlite import binding
from numba import njit, types
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE

_WORDS = PAGE_SIZE // 8

# The extension module of xxhash exports the library that it wraps: compiled loops call it without the interpreter.
binding.load_library_permanently(xxhash._xxhash.__file__)  # type: ignore[attr-defined]
_xxh3: Any = types.ExternalFunction("XXH3_64bits", types.uint64(types.uintp, types.uint64))
_xxh3_seeded: Any = types.ExternalFunction(
    "XXH3_64bits_withSeed", types.uint64(types.uintp, types.uint64, types.uint64)
)
xxh3_with_secret: Any = types.ExternalFunction(
    "XXH3_64bits_withSecret", types.uint64(types.uintp, types.uint64, types.uintp, types.uint64)
)
"""For compiled loops: the digest of (address, length) under the secret at (address, length)."""


@njit("boolean(uint8[::1], int64)", cache=True, nogil=True)
def is_zero(buffer: NDArray[np.uint8], page: int) -> bool:
    """Whether a page of ``buffer`` is all zeros, for compiled loops."""
    words = buffer[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].view(np.uint64)
    for block in range(0, _WORDS, 16):
        # Sixteen words at a time: enough for the compiler to vectorise, little enough to leave a full page at once.
        together = np.uint64(0)
        for word in range(16):
            together |= words[block + word]
        if together:
            return False
    return True


@njit("void(uint8[::1], boolean[::1])", cache=True, nogil=True)
def _zero_pages(buffer: NDArray[np.uint8], out: NDArray[np.bool_]) -> None:
    for page in range(out.shape[0]):
        out[page] = is_zero(buffer, page)


def zero_pages(buffer: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say of each page in ``buffer`` (whole pages, 8-byte aligned) whether it is all zeros.

    :return: one bool a page. The GIL is released meanwhile.
    """
    out = np.empty(buffer.size // PAGE_SIZE, dtype=np.bool_)
    _zero_pages(buffer, out)
    return out


@njit("uint64(uintp)", cache=True, nogil=True)
def page_digest(address: int) -> int:
    """:func:`page_digests` of the page at ``address``, for compiled loops."""
    return _xxh3(address, PAGE_SIZE)  # type: ignore[no-any-return]


@njit("uint64(uintp, uint64, uint64)", cache=True, nogil=True)
def keyed_digest(address: int, length: int, seed: int) -> int:
    """Digest ``length`` bytes at ``address`` with XXH3, 64 bits, under a seed."""
    return _xxh3_seeded(address, length, seed)  # type: ignore[no-any-return]


@njit("void(uint8[::1], uint64, uint64[:, ::1])", cache=True, nogil=True)
def _keyed_digests(buffer: NDArray[np.uint8], seed: int, out: NDArray[np.uint64]) -> None:
    for page in range(out.shape[0]):
        address = buffer.ctypes.data + page * PAGE_SIZE
        out[page, 0] = keyed_digest(address, PAGE_SIZE, seed)
        out[page, 1] = keyed_digest(address, PAGE_SIZE, int(~np.uint64(seed)))


def keyed_digests(buffer: NDArray[np.uint8], seed: int) -> NDArray[np.uint64]:
    """Digest each page in ``buffer`` with 128 bits under a seed; shape (pages, 2)."""
    out = np.empty((buffer.size // PAGE_SIZE, 2), dtype=np.uint64)
    _keyed_digests(buffer, seed, out)
    return out


@njit("void(uint8[::1], uint64[::1])", cache=True, nogil=True)
def _page_digests(buffer: NDArray[np.uint8], out: NDArray[np.uint64]) -> None:
    for page in range(out.size):
        out[page] = page_digest(buffer.ctypes.data + page * PAGE_SIZE)


def page_digests(buffer: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Digest each page in ``buffer`` (whole pages) with XXH3, 64 bits.

    Not keyed: it tells accidents, not attacks; what crosses a network is authenticated by TLS.
    """
    out = np.empty(buffer.size // PAGE_SIZE, dtype=np.uint64)
    _page_digests(buffer, out)
    return out
