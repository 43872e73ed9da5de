"""PageSet against Python's set, by property."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.pages.pageset import PageSet, chop

PAGES = 200
page_sets = st.sets(st.integers(0, PAGES - 1))


def made(numbers: set[int]) -> PageSet:
    return PageSet.from_numbers(PAGES, np.array(sorted(numbers), dtype=np.int64))


def spelled(runs: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> list[int]:
    return [page for first, count in runs.tolist() for page in range(first, first + count)]


@given(page_sets)
def test_runs_are_maximal_and_spell_the_set(numbers: set[int]) -> None:
    runs = made(numbers).runs()
    assert spelled(runs) == sorted(numbers)
    assert (runs[1:, 0] > runs[:-1, 0] + runs[:-1, 1]).all()


@given(page_sets)
def test_a_set_that_lacks_but_a_few_pages_is_told_apart_from_a_full_one(missing: set[int]) -> None:
    pages = ~made(missing)
    there = [page for page in range(PAGES) if page not in missing]
    assert spelled(pages.runs()) == there
    assert pages.numbers().tolist() == there
    assert len(pages) == len(there)


@given(page_sets, page_sets)
def test_the_algebra_is_that_of_sets(left: set[int], right: set[int]) -> None:
    assert made(left) | made(right) == made(left | right)
    assert made(left) & made(right) == made(left & right)
    assert made(left) - made(right) == made(left - right)
    assert ~made(left) == made(set(range(PAGES)) - left)
    assert len(made(left)) == len(left)
    assert bool(made(left)) == bool(left)


@given(page_sets, st.integers(-5, PAGES + 5))
def test_membership(numbers: set[int], page: int) -> None:
    assert (page in made(numbers)) == (page in numbers)


@given(page_sets, st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES)), max_size=8))
def test_adding_and_discarding_runs(numbers: set[int], pairs: list[tuple[int, int]]) -> None:
    runs = np.array([(first, min(count, PAGES - first)) for first, count in pairs], dtype=np.int64).reshape(-1, 2)
    ours = made(numbers)
    ours.add(runs)
    assert ours == made(numbers | set(spelled(runs)))
    ours.discard(runs)
    assert ours == made(numbers - set(spelled(runs)))


@given(page_sets)
def test_the_bitmap_goes_round_trip(numbers: set[int]) -> None:
    ours = made(numbers)
    assert PageSet(PAGES, ours.bits().copy()) == ours
    assert PageSet.from_mask(ours.mask()) == ours
    assert ours.numbers().tolist() == sorted(numbers)


@pytest.mark.parametrize("run", [(-1, 2), (0, PAGES + 1), (PAGES, 1), (3, -1)])
def test_a_run_outside_is_refused(run: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside"):
        PageSet(PAGES).add(np.array([run], dtype=np.int64))


def test_a_bitmap_with_bits_beyond_the_last_page_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        PageSet(4, np.array([0b10000], dtype=np.uint8))


def test_sets_of_different_guests_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different guests"):
        PageSet(8) | PageSet(16)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 300)), max_size=6), st.integers(1, 64))
def test_chopping_keeps_pages_and_order(pairs: list[tuple[int, int]], most: int) -> None:
    runs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    pieces = chop(runs, most)
    assert spelled(pieces) == spelled(runs)
    assert not pieces.size or pieces[:, 1].max() <= most
