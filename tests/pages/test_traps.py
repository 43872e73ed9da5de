"""What is noted is taken once, in order, whoever noted it; what finds no room is counted."""

from __future__ import annotations

import os

import numpy as np

from outboard.pages.traps import TrapRing, note


def noted(ring: TrapRing, page: int, after: int, at: int, write: int = 0) -> bool:
    return bool(note(ring.traced, ring.state, ring.records, page, after, at, at // 2, write))


def test_a_traced_page_is_noted_once() -> None:
    ring = TrapRing(16)
    ring.traced[[3, 5]] = 1
    assert noted(ring, 5, 10, 12, 1)
    assert not noted(ring, 5, 13, 13)
    assert not noted(ring, 4, 13, 13)
    assert noted(ring, 3, 14, 14)
    taken = ring.take()
    assert taken.tolist() == [(5, 10, 12, 6, 1), (3, 14, 14, 7, 0)]
    assert taken["page"].tolist() == [5, 3]
    assert not ring.traced.any()
    assert len(ring.take()) == 0


def test_the_ring_goes_round() -> None:
    ring = TrapRing(8, room=4)
    for turn in range(5):
        ring.traced[:3] = 1
        for page in range(3):
            assert noted(ring, page, turn, turn)
        assert ring.take()["at"].tolist() == [turn] * 3
    assert ring.dropped == 0


def test_what_finds_no_room_is_counted_and_untraced() -> None:
    ring = TrapRing(8, room=4)
    ring.traced[:] = 1
    for page in range(8):
        assert noted(ring, page, 0, page)
    assert ring.dropped == 4
    assert ring.take()["page"].tolist() == [0, 1, 2, 3]
    assert not ring.traced.any()


def test_another_process_notes() -> None:
    ring = TrapRing(1000)
    ring.traced[:] = 1
    child = os.fork()
    if child == 0:
        for page in range(1000):
            noted(ring, page, page, page + 1)
        os._exit(0)
    seen: list[int] = []
    while len(seen) < 1000:
        seen += ring.take()["page"].tolist()
    os.waitpid(child, 0)
    assert np.array_equal(seen, np.arange(1000))
