"""Patterns of page accesses, of which everything is known: what a miss-rate curve is judged on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int32]
_HOT = 16
_PHASES = 4


def _uniform(rng: np.random.Generator, pages: int, length: int) -> Pages:
    return rng.integers(pages, size=length, dtype=np.int32)


def _zipf(exponent: float) -> Callable[[np.random.Generator, int, int], Pages]:
    def made(rng: np.random.Generator, pages: int, length: int) -> Pages:
        weights = np.arange(1, pages + 1) ** -exponent
        ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(length))
        # Hot pages lie anywhere.
        return rng.permutation(pages).astype(np.int32)[np.minimum(ranks, pages - 1)]

    return made


def _loop(rng: np.random.Generator, pages: int, length: int) -> Pages:
    del rng
    return (np.arange(length) % (pages * 3 // 4)).astype(np.int32)


def _scan_and_hot(rng: np.random.Generator, pages: int, length: int) -> Pages:
    """Half the accesses scan all pages in order, the others go to a sixteenth of them."""
    found = rng.integers(pages // _HOT, size=length, dtype=np.int32)
    scans = rng.random(length) < 0.5
    found[scans] = np.arange(int(scans.sum())) % pages
    return found


def _phases(rng: np.random.Generator, pages: int, length: int) -> Pages:
    """Uniform over half of the pages, another half in each phase."""
    half = pages // 2
    found = rng.integers(half, size=length, dtype=np.int32)
    for phase in range(_PHASES):
        start, end = length * phase // _PHASES, length * (phase + 1) // _PHASES
        found[start:end] += int(rng.integers(pages - half))
    return found


PATTERNS: dict[str, Callable[[np.random.Generator, int, int], Pages]] = {
    "uniform": _uniform,
    "zipf-0.8": _zipf(0.8),
    "zipf-1.1": _zipf(1.1),
    "loop": _loop,
    "scan-hot": _scan_and_hot,
    "phases": _phases,
}
"""Each makes a sequence of page numbers: (rng, pages, length)."""
