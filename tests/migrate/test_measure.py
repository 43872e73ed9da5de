"""Shares that were sampled are ranges, and hold the truth."""

from __future__ import annotations

import numpy as np

from outboard.migrate.measure import share_of
from outboard.migrate.plan import Range


def test_what_was_counted_is_exact() -> None:
    assert share_of(7, 100, 100) == Range(7, 7)
    assert share_of(0, 0, 0) == Range(0, 0)


def test_what_was_sampled_holds_the_truth_nearly_always() -> None:
    random = np.random.default_rng(5)
    missed = 0
    for _ in range(400):
        true = int(random.integers(0, 1_000_001))
        found = int(random.binomial(1000, true / 1_000_000))
        span = share_of(found, 1000, 1_000_000)
        assert span.high is not None
        assert 0 <= span.low <= span.high <= 1_000_000
        missed += not span.low <= true <= span.high
    assert missed <= 8
