"""Labels are found, counted and set as NumPy would, however the eight-page steps fall."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.pages.labels import any_labelled, count, labelled, put
from outboard.pages.pageset import PageSet

VALUES = (0, 1, 0x7F, 0x80, 0xFF)


@st.composite
def labels_and_pages(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Stretches of like labels, and a mask of pages."""
    labels: list[int] = []
    mask: list[bool] = []
    for length in draw(st.lists(st.integers(1, 40), max_size=12)):
        labels += [draw(st.sampled_from(VALUES))] * length
        mask += draw(st.one_of(st.just([False] * length), st.lists(st.booleans(), min_size=length, max_size=length)))
    return np.array(labels, dtype=np.uint8), np.array(mask, dtype=np.bool_)


@given(labels_and_pages(), st.sampled_from(VALUES), st.sampled_from(VALUES))
def test_labels_are_what_numpy_makes_of_them(
    drawn: tuple[NDArray[np.uint8], NDArray[np.bool_]], value: int, new: int
) -> None:
    labels, mask = drawn
    pages = PageSet.from_mask(mask)
    assert labelled(labels, value) == PageSet.from_mask(labels == value)
    assert labelled(labels, value, otherwise=True) == PageSet.from_mask(labels != value)
    assert count(labels, value) == np.count_nonzero(labels == value)
    assert any_labelled(labels, pages, value) == bool((labels[mask] == value).any())
    some, all_of_them = labels.copy(), labels.copy()
    put(some, pages, new, over=value)
    put(all_of_them, pages, new)
    assert np.array_equal(some, np.where(mask & (labels == value), new, labels))
    assert np.array_equal(all_of_them, np.where(mask, new, labels))


def test_pages_of_another_guest_are_not_labelled() -> None:
    labels: NDArray[np.uint8] = np.zeros(100, dtype=np.uint8)
    with pytest.raises(ValueError, match="100 labels for a guest of 101 pages"):
        put(labels, PageSet.full(101), 1)
    with pytest.raises(ValueError, match="100 labels"):
        any_labelled(labels, PageSet.full(99), 1)
