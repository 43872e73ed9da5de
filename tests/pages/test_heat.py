"""Heat forgets at its half-life, orders by frequency, and knows what is cold."""

from __future__ import annotations

import numpy as np
import pytest

from outboard.pages.heat import Heat


def pages(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, dtype=np.int64)


def test_a_steady_rate_is_told_as_it_is() -> None:
    heat = Heat(4, half_life=10.0, now=100.0)
    for tick in range(1000):
        heat.touch(pages(1), 100.0 + tick / 5)
    assert heat.frequencies(300.0) == pytest.approx([0, 5, 0, 0], rel=0.05)


def test_what_lies_a_half_life_back_counts_half() -> None:
    heat = Heat(2, half_life=10.0, now=0.0)
    heat.touch(pages(0), 0.0)
    heat.touch(pages(1), 10.0)
    cold, warm = heat.frequencies(10.0)
    assert warm == pytest.approx(2 * cold)
    assert heat.frequencies(20.0)[1] == pytest.approx(cold)


def test_the_hottest_come_first() -> None:
    heat = Heat(8, half_life=1.0, now=0.0)
    heat.touch(pages(3, 3, 3, 5, 5, 6), 0.0)
    assert heat.hottest_first().tolist() == [3, 5, 6]
    heat.touch(pages(6), 3.0)
    assert heat.hottest_first().tolist() == [6, 3, 5]
    heat.touch(pages(0, 1), 3.0)
    assert heat.hottest_first().tolist() == [6, 0, 1, 3, 5]


def test_a_long_time_does_not_overflow() -> None:
    heat = Heat(2, half_life=0.1, now=0.0)
    for moment in range(0, 1000, 7):
        heat.touch(pages(0), float(moment))
    heat.touch(pages(1), 1000.0)
    assert np.isfinite(heat.frequencies(1000.0)).all()
    assert heat.hottest_first()[0] == 1


def test_cold_is_what_was_not_touched_for_so_long() -> None:
    heat = Heat(4, half_life=1.0, now=50.0)
    heat.touch(pages(1), 51.0)
    heat.touch(pages(2), 58.0)
    assert not heat.cold(10.0, 59.0)
    assert heat.cold(5.0, 60.0).numbers().tolist() == [0, 1, 3]
    assert heat.cold(10.0, 60.0).numbers().tolist() == [0, 3]
    assert len(heat.cold(2.0, 61.0)) == 4


def test_large_pages_are_one() -> None:
    heat = Heat(1000, half_life=1.0, now=0.0, per=512)
    heat.touch(pages(5, 511, 999), 0.0)
    assert heat.frequencies(0.0)[0] == pytest.approx(2 * heat.frequencies(0.0)[1])
    assert heat.hottest_first().tolist() == [0, 512]
    assert len(heat.cold(1.0, 2.0)) == 1000
    with pytest.raises(IndexError):
        heat.touch(pages(1024), 0.0)
