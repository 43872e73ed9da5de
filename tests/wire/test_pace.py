"""The pace on links that are simulated: a rate, a queue, a sender that fills what it may."""

from __future__ import annotations

import pytest

from outboard.wire.pace import LinkEstimate

STEP = 0.005


class Link:
    """A bottleneck with a queue; ``run`` sends at the estimate's pace, or as fast as the queue takes it."""

    def __init__(self, rate: float, room: float = 500_000) -> None:
        self.rate = rate
        self.room = max(room, 2 * rate * STEP)
        self.queue = 0.0
        self.acknowledged = 0.0
        self.now = 0.0
        self.stall_us = 0
        self.estimate = LinkEstimate(lambda: self.now)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            pace = self.estimate.rate
            offered = (pace if pace is not None else 10 * self.rate) * STEP
            self.queue = min(self.room, self.queue + offered)
            out = min(self.queue, self.rate * STEP)
            self.queue -= out
            self.acknowledged += out
            self.now += STEP
            rtt = 50 + int(self.queue / self.rate * 1e6) + self.stall_us
            self.estimate.sample(int(self.acknowledged), rtt, 50, busy=True)


@pytest.mark.parametrize("rate", [12e6, 119e6, 1e9])
def test_the_bulk_settles_just_below_the_link_and_the_queue_drains(rate: float) -> None:
    link = Link(rate)
    link.run(3)
    assert link.estimate.rate is not None
    assert 0.8 * rate < link.estimate.rate < 1.01 * rate
    assert link.queue / rate < 0.002


def test_long_round_trips_alone_do_not_slow_it() -> None:
    link = Link(119e6)
    link.run(1)
    link.stall_us = 20_000
    link.run(3)
    assert link.estimate.rate is not None
    assert link.estimate.rate > 0.8 * 119e6


def test_a_link_that_gets_slower_is_followed() -> None:
    link = Link(119e6)
    link.run(1)
    link.rate = 40e6
    link.run(3)
    assert link.estimate.rate is not None
    assert link.estimate.rate < 42e6


def test_a_link_that_gets_faster_is_found_out() -> None:
    link = Link(40e6)
    link.run(1)
    link.rate = 119e6
    link.run(20)
    assert link.estimate.rate is not None
    assert link.estimate.rate > 100e6


def test_a_pause_tells_nothing() -> None:
    link = Link(119e6)
    link.run(1)
    before = link.estimate.rate
    link.now += 5
    link.estimate.sample(int(link.acknowledged), 50, 50, busy=False)
    link.run(0.5)
    assert before is not None
    assert link.estimate.rate is not None
    assert link.estimate.rate >= 0.9 * before


@pytest.mark.parametrize("limit", [3e6, 10e6, 60e6])
def test_what_the_user_limits_is_not_taken_for_the_link(limit: float) -> None:
    """Segments of 64 KiB, each of which is a long round trip at such a pace."""
    estimate = LinkEstimate(lambda: now)
    now = sent = 0.0
    acknowledged = 0
    for _ in range(4000):
        now += STEP
        pace = min(limit, estimate.rate or limit)
        sent += pace * STEP
        acknowledged = int(sent) // 65536 * 65536
        estimate.sample(acknowledged, 50 + int(65536 / pace * 1e6), 50, busy=True, limit=limit)
    assert estimate.rate is None


def test_a_link_slower_than_the_limit_is_found_out() -> None:
    link = Link(40e6)
    for _ in range(600):
        pace = min(60e6, link.estimate.rate or 60e6)
        link.queue = min(link.room, link.queue + pace * STEP)
        out = min(link.queue, link.rate * STEP)
        link.queue -= out
        link.acknowledged += out
        link.now += STEP
        rtt = 50 + int(link.queue / link.rate * 1e6)
        link.estimate.sample(int(link.acknowledged), rtt, 50, busy=True, limit=60e6)
    assert link.estimate.rate is not None
    assert 30e6 < link.estimate.rate < 41e6


def test_no_window_makes_a_link_of_nothing() -> None:
    link = Link(119e6)
    link.run(1)
    link.rate = 10.0
    link.run(60)
    assert link.estimate.rate is not None
    assert link.estimate.rate > 100_000
