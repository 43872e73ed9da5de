"""Versions of sent pages: what is known of a page is what was sent of it last."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.migrate.versions import UNKNOWN, VERSIONS, Versions

PAGES = 3 * VERSIONS


def page(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 256, (1, 4096), dtype=np.uint8)


def known(versions: Versions, number: int, content: NDArray[np.uint8]) -> int:
    return int(versions.replace(np.array([number]), content)[0][0])


@given(
    st.lists(
        st.tuples(st.sampled_from([3, 4, VERSIONS + 3, 2 * VERSIONS + 3]), st.integers(0, 5), st.booleans()),
        max_size=30,
    )
)
def test_changes_lead_from_what_was_sent_last(sends: list[tuple[int, int, bool]]) -> None:
    versions = Versions(PAGES)
    last: dict[int, NDArray[np.uint8]] = {}
    for number, seed, zero in sends:
        if zero:
            versions.drop(np.array([number]))
            last.pop(number, None)
            continue
        now = page(seed)
        words, changes = versions.replace(np.array([number]), now)
        if words[0] != UNKNOWN:
            assert np.array_equal(last[number] ^ changes[0], now[0])
            assert words[0] == np.count_nonzero((last[number] ^ now[0]).view(np.uint64))
        last[number] = now[0]


def test_a_page_sent_again_takes_the_place_of_one_sent_once() -> None:
    versions = Versions(PAGES)
    first, second = 5, VERSIONS + 5
    assert known(versions, first, page(1)) == UNKNOWN
    assert known(versions, second, page(2)) == UNKNOWN
    assert known(versions, first, page(1)) == 0
    assert known(versions, second, page(2)) == UNKNOWN
    assert known(versions, second, page(2)) == 0
    assert known(versions, first, page(1)) == UNKNOWN


def test_what_was_sent_otherwise_is_not_known() -> None:
    versions = Versions(PAGES)
    known(versions, 5, page(1))
    versions.drop(np.array([VERSIONS + 5, 6]))
    assert known(versions, 5, page(1)) == 0
    versions.drop(np.array([4, 5]))
    assert known(versions, 5, page(1)) == UNKNOWN


def test_the_pages_of_one_stream_use_all_of_its_places() -> None:
    of = 4
    versions = Versions(PAGES, of)
    numbers = np.concatenate([np.arange(512) + 512 * (1 + of * chunk) for chunk in range(VERSIONS // of // 512)])
    pages = np.ones((numbers.size, 4096), dtype=np.uint8)
    assert np.all(versions.replace(numbers, pages)[0] == UNKNOWN)
    assert np.all(versions.replace(numbers, pages)[0] == 0)
