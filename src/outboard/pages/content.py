"""What pages hold: which are all zeros, and digests to compare them by."""

from __future__ import annotations

import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE

_WORDS = PAGE_SIZE // 8


@njit("void(uint64[::1], boolean[::1])", cache=True, nogil=True)
def _zero_pages(words: NDArray[np.uint64], out: NDArray[np.bool_]) -> None:
    for page in range(out.shape[0]):
        base = page * _WORDS
        zero = True
        for block in range(0, _WORDS, 16):
            # Sixteen words at a time: enough for the compiler to vectorise, little enough to leave a full page at once.
            together = np.uint64(0)
            for word in range(16):
                together |= words[base + block + word]
            if together:
                zero = False
                break
        out[page] = zero


def zero_pages(buffer: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say of each page in ``buffer`` (whole pages, 8-byte aligned) whether it is all zeros.

    :return: one bool a page. The GIL is released meanwhile.
    """
    out = np.empty(buffer.size // PAGE_SIZE, dtype=np.bool_)
    _zero_pages(buffer.view(np.uint64), out)
    return out


def page_digests(buffer: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Digest each page in ``buffer`` (whole pages) with XXH3, 64 bits.

    Not keyed: it tells accidents, not attacks; what crosses a network is authenticated by TLS.
    """
    view = buffer.data.cast("B")
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(view[at : at + PAGE_SIZE]) for at in range(0, len(view), PAGE_SIZE)),
        dtype=np.uint64,
        count=len(view) // PAGE_SIZE,
    )
