"""Which pages go first, and which have no turn."""

from __future__ import annotations

import numpy as np

from outboard.migrate import ranking
from outboard.migrate.outbox import Outbox
from outboard.migrate.turns import NEVER
from outboard.pages.pageset import PageSet
from outboard.vmm.enlighten import PageClass

PAGES = 64


def some(*numbers: int) -> PageSet:
    return PageSet.from_numbers(PAGES, np.array(numbers, dtype=np.int64))


def test_the_guests_word_orders_and_gives_free_pages_no_turn() -> None:
    outbox = Outbox(PAGES)
    ranking.rank_all(outbox, ~some(9))
    said = [PageClass.INACTIVE, PageClass.PAGE_TABLES, PageClass.FREE, PageClass.KERNEL]
    ranking.rank_classes(outbox, 6, np.array(said, dtype=np.uint8))
    ranks = outbox.rank[5:11].tolist()
    assert ranks[3] == ranks[4] == NEVER  # free, and never written
    assert ranks[2] < ranks[1] < ranks[0] == ranks[5] == ranking.UNCLASSED
    ranking.revive(outbox, some(8))
    assert outbox.rank[8] == ranking.UNCLASSED


def test_without_a_word_what_was_touched_goes_first() -> None:
    outbox = Outbox(PAGES)
    ranking.rank_all(outbox, ~some(9))
    ranking.rank_touched(outbox, some(3, 9, 40))
    first = np.flatnonzero(outbox.rank < ranking.UNCLASSED).tolist()
    assert first == [3, 40]
    assert outbox.rank[9] == NEVER
    assert outbox.rank[3] > ranking.EARLY_UPTO


def test_what_devices_are_about_to_touch_goes_ahead_of_all_and_the_rings_ahead_of_that() -> None:
    outbox = Outbox(PAGES)
    ranking.rank_all(outbox, ~some(9))
    ranking.rank_devices(outbox, some(30), some(9, 30, 31))
    now, later = ranking.split_stale(outbox, some(9, 29, 30, 31), 2)
    assert outbox.rank[[30, 9, 31]].tolist() == [ranking.QUEUES, ranking.IN_FLIGHT, ranking.IN_FLIGHT]
    assert now == some(9, 30)
    assert later == some(29, 31)


def test_what_has_gone_as_the_free_part_of_a_large_page_is_not_brought_to_life_by_devices() -> None:
    outbox = Outbox(PAGES)
    ranking.rank_all(outbox, ~some(9, 10))
    outbox.sent[[8, 9]] = 1
    ranking.rank_devices(outbox, some(8, 9), some(10))
    assert outbox.rank[[8, 9, 10]].tolist() == [ranking.QUEUES, NEVER, ranking.IN_FLIGHT]
