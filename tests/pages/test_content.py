"""Zero tests and digests against the obvious way of doing them."""

import numpy as np
import xxhash

from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests, zero_pages


def test_zero_pages_finds_a_single_byte_anywhere() -> None:
    for at in (0, 1, 127, 128, 2048, PAGE_SIZE - 1):
        buffer = np.zeros(3 * PAGE_SIZE, dtype=np.uint8)
        buffer[PAGE_SIZE + at] = 1
        assert zero_pages(buffer).tolist() == [True, False, True]


def test_zero_pages_agrees_with_numpy() -> None:
    random = np.random.default_rng(1)
    buffer = random.integers(0, 256, 64 * PAGE_SIZE, dtype=np.uint8).reshape(64, PAGE_SIZE)
    buffer[random.integers(0, 2, 64, dtype=np.bool_)] = 0
    assert zero_pages(buffer.reshape(-1)).tolist() == (~buffer.any(axis=1)).tolist()


def test_digests_are_those_of_each_page() -> None:
    buffer = np.arange(2 * PAGE_SIZE, dtype=np.uint64).view(np.uint8)[: 2 * PAGE_SIZE].copy()
    expected = [xxhash.xxh3_64_intdigest(buffer[at : at + PAGE_SIZE].tobytes()) for at in (0, PAGE_SIZE)]
    assert page_digests(buffer).tolist() == expected
