"""The estimator on spans whose meaning is known."""

from __future__ import annotations

import numpy as np
import pytest

from outboard.trace.curve import GROUPS, Exposure, SpanHistogram, curve, working_set

RNG = np.random.default_rng(1)


def histogram(spans: list[float], delays: list[float]) -> SpanHistogram:
    made = SpanHistogram()
    made.add(np.arange(len(spans)) % GROUPS, np.array(spans), np.array(delays))
    return made


def test_each_access_counts_once_below_its_gap() -> None:
    """Pages touched every 0.5 s each, armed at random moments: 2 accesses a second with gaps of 0.5 s."""
    rng = np.random.default_rng(3)
    delay, pages, seconds = 0.7, 400, 50.0
    spans = []
    for _ in range(pages):
        now = rng.random() * 0.5
        while True:
            armed = now + rng.exponential(delay)
            now = armed + (0.5 - (armed - now) % 0.5)
            if now > seconds:
                break
            spans.append(now - armed)
    exposure = Exposure(seconds, seconds, 1e9, pages, pages)
    windows, sizes = working_set(histogram(spans, [delay] * len(spans)), exposure)
    assert np.interp([0.1, 0.25, 0.4], windows, sizes) == pytest.approx(
        [0.2 * pages, 0.5 * pages, 0.8 * pages], rel=0.03
    )
    assert sizes[-1] == pytest.approx(pages, rel=0.03)


def test_a_sample_stands_for_all_pages() -> None:
    some = histogram([0.1, 0.2, 0.3], [0.5] * 3)
    at = np.array([1.0, 5.0])
    one = curve(some, Exposure(10, 10, 10, 100, 100), at, RNG)
    ten = curve(some, Exposure(10, 10, 10, 100, 1000), at * 10, RNG)
    assert ten.misses == pytest.approx(one.misses * 10)
    assert ten.horizon == pytest.approx(one.horizon * 10)


def test_rates_are_by_the_clock() -> None:
    some = histogram([0.1, 0.2, 0.3], [0.5] * 3)
    at = np.array([0.1])
    busy = curve(some, Exposure(10, 10, 10, 100, 100), at, RNG)
    rare = curve(some, Exposure(40, 10, 10, 100, 100), at, RNG)
    assert rare.misses == pytest.approx(busy.misses / 4)


def test_without_spans_there_are_no_misses() -> None:
    found = curve(SpanHistogram(), Exposure(1, 1, 1, 10, 10), np.array([1.0, 2.0]), RNG)
    assert found.misses.tolist() == [0, 0]
    assert found.spans == 0
    assert found.horizon == 0


def test_a_ratio_is_no_more_than_one() -> None:
    found = curve(histogram([0.01] * 50, [1.0] * 50), Exposure(10, 10, 10, 10, 10), np.array([0.1]), RNG)
    assert found.ratio(0.001).tolist() == [1.0]


def test_spans_beyond_every_bin_are_kept() -> None:
    found = histogram([0.0, 1e9], [1.0, 1.0])
    assert found.spans == 2
    other = histogram([1.0], [1.0])
    other.merge(found)
    assert other.spans == 3
