"""The exact stack gives what an LRU memory of each size, played out, would miss."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from bench.mattson import misses
from bench.patterns import PATTERNS

PAGES = 64


def played(accesses: list[int], since: int, size: int) -> int:
    memory: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for index, page in enumerate(accesses):
        if page in memory:
            memory.move_to_end(page)
            continue
        missed += index >= since
        memory[page] = None
        if len(memory) > size:
            memory.popitem(last=False)
    return missed


@pytest.mark.parametrize("pattern", PATTERNS)
def test_misses_are_those_of_an_lru_memory(pattern: str) -> None:
    accesses = PATTERNS[pattern](np.random.default_rng(3), PAGES, 5000)
    assert int(accesses.min()) >= 0
    assert int(accesses.max()) < PAGES
    sizes = np.array([1, 2, 7, 31, 48, 63, 64])
    found = misses(accesses, PAGES, 1000, sizes.astype(np.float64))
    assert found.tolist() == [played(accesses.tolist(), 1000, int(size)) for size in sizes]
