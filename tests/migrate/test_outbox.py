"""What is due, in which order, and that each page has its turn once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.migrate.outbox import Outbox, Share
from outboard.migrate.sending import batches
from outboard.migrate.turns import NEVER
from outboard.pages.pageset import PageSet

PAGES = 300
ranks = st.lists(st.sampled_from([0, 1, 2, 7, NEVER]), min_size=PAGES, max_size=PAGES)
taken = st.sets(st.integers(0, PAGES - 1))


def filled(rank: list[int], sent: set[int]) -> Outbox:
    outbox = Outbox(PAGES)
    outbox.rank[:] = rank
    outbox.sent[sorted(sent)] = 1
    return outbox


@given(ranks, taken, st.integers(0, 8))
def test_walking_the_ranks_meets_each_due_page_once_in_order(rank: list[int], sent: set[int], upto: int) -> None:
    outbox = filled(rank, sent)
    met = [
        page
        for turn in outbox.ranks_due(0, PAGES, upto)
        for batch in batches(outbox.due(0, PAGES, turn))
        for first, count in batch
        for page in range(first, first + count)
    ]
    due = [page for page in range(PAGES) if rank[page] <= upto and page not in sent]
    assert met == sorted(due, key=lambda page: (rank[page], page))


@given(ranks, taken)
def test_a_range_is_walked_alone(rank: list[int], sent: set[int]) -> None:
    outbox = filled(rank, sent)
    pages = [
        page
        for turn in outbox.ranks_due(100, 50, NEVER - 1)
        for first, count in outbox.due(100, 50, turn).tolist()
        for page in range(first, first + count)
    ]
    assert sorted(pages) == [page for page in range(100, 150) if rank[page] != NEVER and page not in sent]


@given(st.integers(1, 8), st.integers(0, 4000), st.integers(1, 5000))
def test_each_page_belongs_to_one_stream_whatever_is_walked(of: int, first: int, count: int) -> None:
    outbox = Outbox(9000)
    outbox.rank[:] = 3
    streams = np.zeros(9000, dtype=np.int64)
    for number in range(of):
        share = Share(number, of)
        runs = outbox.due(first, count, 3, share).tolist()
        for begin, length in runs:
            streams[begin : begin + length] += 1
            assert {page // 512 % of for page in range(begin, begin + length)} == {number}
        assert outbox.ranks_due(first, count, 9, share) == ([3] if runs else [])
    assert np.all(streams[first : first + count] == 1)
    assert streams.sum() == count


def test_the_limit_is_of_all_streams_that_send() -> None:
    outbox = Outbox(8)
    outbox.note_busy(0, busy=True)
    assert (outbox.limit, outbox.limit_each) == (None, None)
    outbox.limit = 120
    for stream in range(4):
        outbox.note_busy(stream, busy=True)
        outbox.count_bulk(1, 2, 30, stream)
        outbox.note_rate(30, stream)
    assert outbox.limit_each == 30
    outbox.note_busy(2, busy=False)
    assert outbox.limit_each == 40
    sent = outbox.statistics()
    assert (sent.data_pages, sent.zero_pages, sent.bulk_bytes, sent.rate) == (4, 8, 120, 120)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), max_size=20))
def test_no_batch_is_longer_than_a_frame_and_all_but_the_last_are_full(pairs: list[tuple[int, int]]) -> None:
    sizes = [sum(count for _, count in batch) for batch in batches(np.array(pairs, dtype=np.int64).reshape(-1, 2))]
    assert sum(sizes) == sum(count for _, count in pairs)
    assert all(size == 64 for size in sizes[:-1])
    assert all(0 < size <= 64 for size in sizes)


@pytest.mark.slow
@given(st.lists(ranks.map(lambda rank: [*rank, *rank][:512]), min_size=3, max_size=3), st.sets(st.integers(0, 1535)))
def test_large_pages_go_whole_in_the_turn_of_their_first_and_then_by_themselves(
    rank: list[list[int]], stale: set[int]
) -> None:
    outbox = Outbox(1536, unit=512)
    outbox.rank[:] = np.concatenate(rank)
    first_turns = [min(block) for block in rank]

    def walk() -> list[tuple[int, int]]:
        met = []
        for turn in outbox.ranks_due(0, 1536, NEVER - 1):
            for batch in batches(outbox.due(0, 1536, turn), 512):
                assert all(outbox.claim(first, count).all() for first, count in batch)
                met += batch
        return met

    whole = walk()
    due = [block for block, turn in enumerate(first_turns) if turn != NEVER]
    assert whole == [(block * 512, 512) for block in sorted(due, key=lambda block: (first_turns[block], block))]
    again = [page for page in sorted(stale) if first_turns[page // 512] != NEVER]
    outbox.again(PageSet.from_numbers(1536, np.array(again, dtype=np.int64)), 0)
    assert [page for first, count in walk() for page in range(first, first + count)] == again
    assert not outbox.unsent()


def test_a_large_page_that_somebody_is_about_to_claim_has_no_parts() -> None:
    outbox = Outbox(1024, unit=512)
    outbox.rank[:] = 3
    outbox.sent[0] = 1
    assert outbox.due(0, 1024, 3, parts=False).tolist() == [[512, 512]]
    assert outbox.due(0, 1024, 3).tolist() == [[1, 511], [512, 512]]
    outbox.sent[512] = 1
    assert outbox.ranks_due(0, 1024, 9, parts=False) == []


def test_of_two_who_want_a_large_page_one_gets_it() -> None:
    outbox = Outbox(1024, unit=512)
    assert outbox.claim_one(512)
    assert not outbox.claim(512, 512).any()
    assert outbox.claim(0, 512).all()
    assert not outbox.claim_one(0)


def test_a_page_that_changed_gets_another_turn() -> None:
    outbox = filled([2] * PAGES, set(range(PAGES)))
    assert not outbox.unsent()
    outbox.again(PageSet.from_runs(PAGES, np.array([[5, 3]])), 0)
    assert outbox.unsent().runs().tolist() == [[5, 3]]
    assert outbox.ranks_due(0, PAGES, NEVER - 1) == [0]


def test_the_limit_and_the_counts_are_read_back() -> None:
    outbox = Outbox(8)
    assert outbox.limit is None
    outbox.limit = 125_000_000
    assert outbox.limit == 125_000_000
    outbox.limit = None
    assert outbox.limit is None
    outbox.count_bulk(3, 2, 1000)
    outbox.count_urgent(1, 50)
    sent = outbox.statistics()
    assert (sent.data_pages, sent.zero_pages, sent.urgent_pages, sent.bulk_bytes, sent.urgent_bytes) == (
        3,
        2,
        1,
        1000,
        50,
    )
