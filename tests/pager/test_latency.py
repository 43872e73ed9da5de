"""Percentiles of the histogram against sorted samples."""

import numpy as np
import pytest

from outboard.pager.latency import LatencyHistogram


def test_an_empty_histogram_has_no_percentile() -> None:
    assert LatencyHistogram().statistics().percentile_us(0.5) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_within_a_bucket(share: float) -> None:
    samples = np.random.default_rng(3).lognormal(11, 1, 5000).astype(np.int64)
    histogram = LatencyHistogram()
    for sample in samples.tolist():
        histogram.record(sample)
    exact = float(np.sort(samples)[max(0, int(np.ceil(share * samples.size)) - 1)]) / 1000
    found = histogram.statistics().percentile_us(share)
    assert found == pytest.approx(exact, rel=0.09)
    assert histogram.statistics().count == 5000


def test_extremes_are_counted() -> None:
    histogram = LatencyHistogram()
    for nanoseconds in (0, 1, 10**15):
        histogram.record(nanoseconds)
    assert histogram.statistics().count == 3
