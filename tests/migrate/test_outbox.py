"""What is due, in which order, and that each page has its turn once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from outboard.migrate.outbox import NEVER, Outbox
from outboard.migrate.sending import batches
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


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), max_size=20))
def test_no_batch_is_longer_than_a_frame_and_all_but_the_last_are_full(pairs: list[tuple[int, int]]) -> None:
    sizes = [sum(count for _, count in batch) for batch in batches(np.array(pairs, dtype=np.int64).reshape(-1, 2))]
    assert sum(sizes) == sum(count for _, count in pairs)
    assert all(size == 64 for size in sizes[:-1])
    assert all(0 < size <= 64 for size in sizes)


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
