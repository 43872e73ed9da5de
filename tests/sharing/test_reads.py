"""Replayed traces of reads: exactly those pages are un-shared that have met a pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.pages.pageset import PageSet
from outboard.sharing.reads import Pattern, Reads, Watch, met

PAGES = 64
RATE, BURST = Pattern("rate", 10, 60.0), Pattern("burst", 3, 3.0)
REMOTE = Pattern("remote", 4, 30.0, remote=True)


def replay(
    watch: Watch, trace: dict[int, list[int]], seconds: int, remote: frozenset[int] = frozenset()
) -> dict[int, int]:
    """When each page was un-shared, of a trace that says in which seconds each page is read; all pages are shared."""
    reads = Reads(PAGES, watch, np.random.default_rng(1))
    shared, gone = PageSet.full(PAGES), {}
    watched = reads.choose(shared, 0.0)
    for second in range(1, seconds + 1):
        read = PageSet.from_numbers(PAGES, np.array([p for p, when in trace.items() if second in when], dtype=np.int64))
        far = PageSet.from_numbers(PAGES, np.array(sorted(remote), dtype=np.int64))
        reads.note(read & watched, read & watched & far, float(second))
        due = reads.due(float(second))
        for page in due.numbers().tolist():
            gone[page] = second
        shared = shared - due
        watched = reads.choose(shared, float(second))
    return gone


def watch(*patterns: Pattern, **more: float) -> Watch:
    return Watch(patterns=patterns, jitter_s=0.0, hold_s=1000.0, **more)  # type: ignore[arg-type]


def test_a_rate_is_met_by_what_is_read_often_and_by_nothing_else() -> None:
    trace = {3: list(range(1, 61, 5)), 4: list(range(1, 61, 7)), 5: [1, 2, 3]}
    # Page 3 is read for the tenth time at 46 s; page 4 nine times in 60 s.
    assert replay(watch(RATE), trace, 60) == {3: 46}


def test_a_burst_is_met_at_once_and_by_nothing_slower() -> None:
    trace = {1: [10, 11, 12], 2: [10, 12, 14, 16, 18], 3: [50, 51], 4: list(range(1, 61, 2))}
    assert replay(watch(BURST), trace, 60) == {1: 12}


def test_only_remote_reads_count_for_a_remote_pattern() -> None:
    trace = {page: [1, 3, 5, 7, 9] for page in range(4)}
    assert replay(watch(REMOTE), trace, 20, remote=frozenset({2, 3, 9})) == {2: 7, 3: 7}


def test_old_reads_are_forgotten() -> None:
    assert replay(watch(Pattern("rate", 3, 10.0)), {1: [1, 5, 12], 2: [1, 5, 9]}, 60) == {2: 9}


def test_the_first_pattern_that_is_met_is_counted() -> None:
    reads = Reads(PAGES, watch(RATE, BURST), np.random.default_rng(1))
    reads.choose(PageSet.full(PAGES), 0.0)
    for second in range(1, 4):
        reads.note(PageSet.from_numbers(PAGES, np.array([7])), PageSet(PAGES), float(second))
    assert reads.met == {"rate": 0, "burst": 1}
    # It is judged once.
    reads.note(PageSet.from_numbers(PAGES, np.array([7])), PageSet(PAGES), 4.0)
    assert reads.met == {"rate": 0, "burst": 1}


def test_un_sharing_waits_a_while_and_goes_in_batches() -> None:
    spread = Watch(patterns=(BURST,), jitter_s=20.0, hold_s=1000.0, batch=4)
    gone = replay(spread, {page: [1, 2, 3] for page in range(20)}, 60)
    assert len(gone) == 20
    assert len(set(gone.values())) > 5
    assert max(list(gone.values()).count(second) for second in gone.values()) <= 4
    assert min(gone.values()) >= 3
    assert max(gone.values()) <= 24


def test_what_was_un_shared_stays_private_for_a_while() -> None:
    reads = Reads(PAGES, watch(BURST, private_s=100.0), np.random.default_rng(1))
    reads.choose(PageSet.full(PAGES), 0.0)
    page = PageSet.from_numbers(PAGES, np.array([7]))
    for second in range(1, 4):
        reads.note(page, PageSet(PAGES), float(second))
    assert reads.due(3.0) == page
    assert reads.private(102.0) == page
    assert not reads.private(104.0)


def test_a_sample_is_watched_and_then_another() -> None:
    reads = Reads(PAGES, Watch(sample=8, hold_s=10.0), np.random.default_rng(1))
    first = reads.choose(PageSet.full(PAGES), 0.0)
    assert len(first) == 8
    assert reads.choose(PageSet.full(PAGES), 9.0) == first
    assert reads.choose(PageSet.full(PAGES), 10.0) != first
    assert not reads.choose(PageSet(PAGES), 30.0)
    reads.note(PageSet(PAGES), PageSet(PAGES), 31.0)


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 12),
)
def test_a_pattern_is_met_exactly_when_a_plain_count_says_so(rows: list[list[bool]], least: int, within: int) -> None:
    read = np.array(rows, dtype=np.bool_)
    times = np.arange(1.0, len(rows) + 1)
    now = float(len(rows))
    found = met([Pattern("one", least, within)], now, times, read, np.zeros_like(read))
    for page in range(5):
        count = sum(row[page] for second, row in enumerate(rows, 1) if second > now - within)
        assert (found[page] == 0) == (count >= least)


@pytest.mark.parametrize(("least", "within"), [(0, 1.0), (1, 0.0), (1, float("inf")), (1, float("nan"))])
def test_a_pattern_that_says_nothing_is_refused(least: int, within: float) -> None:
    with pytest.raises(ValueError, match="at_least"):
        Pattern("odd", least, within)
