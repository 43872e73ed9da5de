"""Kept pages: both ends hold the same, and a page is only the same if every byte is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.pages.kept import KEEP, PLAIN, RECALL, KeptPages

NO_PAGES: NDArray[np.uint8] = np.empty((0, 4096), dtype=np.uint8)


def page(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, 4096, dtype=np.uint8)


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8), max_size=8), st.integers(1, 8))
def test_the_other_end_follows(batches: list[list[int]], slots: int) -> None:
    near, far = KeptPages(slots), KeptPages(slots)
    for seeds in batches:
        pages = np.stack([page(seed) for seed in seeds])
        where, same = near.meet(pages)
        assert where.max() < slots
        out = np.zeros_like(pages)
        orders = np.where(same, np.uint8(RECALL), np.uint8(KEEP))
        assert far.follow(orders, where, pages[~same], out) is None
        assert np.array_equal(out, pages)


def test_what_was_met_is_met_again() -> None:
    kept = KeptPages(4096)
    pages = np.stack([page(seed) for seed in (1, 2, 1)])
    assert kept.meet(pages)[1].tolist() == [False, False, True]
    assert kept.meet(pages)[1].tolist() == [True, True, True]


def test_a_digest_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboard.pages.kept.page_digests", lambda buffer: np.zeros(buffer.size // 4096, np.uint64))
    kept = KeptPages(4096)
    one, other = page(1), page(1)
    other[4095] ^= 1
    assert kept.meet(np.stack([one, other, other, one]))[1].tolist() == [False, False, True, False]


def test_what_is_passed_over_stays() -> None:
    kept = KeptPages(8)
    out = np.full((3, 4096), 7, dtype=np.uint8)
    orders = np.array([PLAIN, 9, PLAIN], dtype=np.uint8)
    pages = np.stack([page(1), page(2)])
    assert kept.follow(orders, np.empty(0, dtype=np.uint16), pages, out) is None
    assert np.array_equal(out[[0, 2]], pages)
    assert np.all(out[1] == 7)


def test_an_empty_slot_is_named() -> None:
    kept = KeptPages(8)
    out = np.zeros((2, 4096), dtype=np.uint8)
    orders = np.array([KEEP, RECALL], dtype=np.uint8)
    assert kept.follow(orders, np.array([3, 5], dtype=np.uint16), page(1).reshape(1, -1), out) == 5
    assert kept.follow(orders[1:], np.array([3], dtype=np.uint16), NO_PAGES, out) is None
    assert np.array_equal(out[0], page(1))
