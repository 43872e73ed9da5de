"""The curve of a sampled trace comes near to the exact one, within its budget; the accesses are simulated."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.mattson import misses
from bench.patterns import PATTERNS
from outboard.trace.sampling import Budget, Sampler, sample
from tests.support.simulated_trace import SimulatedTrace

pytestmark = pytest.mark.slow

PAGES, RATE, WARM = 4096, 100_000.0, 1.0
SIZES = np.linspace(0, PAGES, 33)[1:]


def sampled(
    pattern: str, budget: Budget, seconds: float, running: float = 1.0
) -> tuple[Sampler, SimulatedTrace, NDArray[np.float64]]:
    """A sampler after ``seconds``, and the misses that an LRU memory of each size had had meanwhile."""
    accesses = PATTERNS[pattern](np.random.default_rng(7), PAGES, int(RATE * (WARM + seconds + 1)))
    trace = SimulatedTrace(accesses, PAGES, RATE, seed=8, running=running)
    trace.now = WARM
    sampler = Sampler(trace, sample(PAGES), PAGES, budget, np.random.default_rng(9), trace.clock)
    while trace.now < WARM + seconds:
        trace.now += sampler.step()
    done = accesses[: int(trace.now * RATE)]
    return sampler, trace, misses(done, PAGES, int(WARM * RATE), SIZES)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_curve_comes_near_to_the_exact_one(pattern: str) -> None:
    sampler, trace, truth = sampled(pattern, Budget(trap_s=1e-5), 12)
    curve = sampler.curve(SIZES)
    seconds = trace.now - WARM
    error = np.abs(curve.ratio(RATE) - truth / (RATE * seconds))
    assert float(error.mean()) < 0.025
    assert curve.seconds == pytest.approx(seconds, abs=0.05)
    assert np.all(np.diff(curve.misses) <= 1e-6 * RATE)
    assert np.all(curve.low <= curve.high)
    inside = (curve.low <= truth / seconds) & (truth / seconds <= curve.high)
    assert inside.mean() > 0.4


def test_a_guest_that_runs_half_of_the_time_has_the_same_curve() -> None:
    whole, *_ = sampled("zipf-0.8", Budget(trap_s=1e-5, slowdown=0.02), 8)
    half, *_ = sampled("zipf-0.8", Budget(trap_s=1e-5, slowdown=0.04), 8, running=0.5)
    # The same spans, counted in other bins.
    assert half.curve(SIZES).misses == pytest.approx(whole.curve(SIZES).misses, rel=0.05, abs=0.02 * RATE)
    windows = np.array([0.01, 0.1, 1.0])
    assert half.working_set(windows) == pytest.approx(whole.working_set(windows), rel=0.02)


def test_the_budget_is_kept() -> None:
    sampler, trace, _ = sampled("uniform", Budget(trap_s=1e-5, slowdown=0.01), 4)
    told = sampler.statistics()
    assert told.arms == trace.arms
    assert told.arms <= 1000 * 4 * 1.02
    assert told.arms >= 1000 * 4 * 0.9
    assert told.traps <= told.arms
    fewer, *_ = sampled("uniform", Budget(trap_s=1e-5, slowdown=0.01, traps=300), 4)
    assert 300 * 4 * 0.9 <= fewer.statistics().arms <= 300 * 4 * 1.02


def test_a_guest_that_hardly_runs_is_traced_as_one_that_runs_a_tenth() -> None:
    budget = Budget(trap_s=1e-5)
    assert budget.afforded(1.0, 0.01) == budget.afforded(1.0, 0.1) == pytest.approx(200)
    sampler, trace, truth = sampled("uniform", Budget(trap_s=1e-5, slowdown=0.2), 4, running=0.01)
    assert 0.9 * 2000 * 4 < trace.arms < 1.02 * 2000 * 4
    curve = sampler.curve(SIZES)
    assert float(np.abs(curve.misses - truth / curve.seconds).mean()) < 0.03 * RATE


def test_windows_of_time_have_curves_of_their_own() -> None:
    sampler, trace, _ = sampled("uniform", Budget(trap_s=1e-5), 4)
    first = sampler.cut(SIZES)
    while trace.now < WARM + 5:
        trace.now += sampler.step()
    second = sampler.cut(SIZES)
    assert first.seconds == pytest.approx(4, abs=0.05)
    assert second.seconds == pytest.approx(1, abs=0.05)
    assert second.spans < first.spans
    assert sampler.curve(SIZES).spans == first.spans + second.spans
    assert second.misses[0] == pytest.approx(RATE, rel=0.3)


def test_the_working_set_is_what_is_touched_within_a_window() -> None:
    sampler, *_ = sampled("uniform", Budget(trap_s=1e-5), 6)
    windows = np.array([0.01, 0.04, 0.1, 100.0])
    found = sampler.working_set(windows)
    expected = PAGES * (1 - np.exp(-windows * RATE / PAGES))
    assert found[:3] == pytest.approx(expected[:3], rel=0.1)
    assert np.isnan(found[3])


def test_the_state_is_bounded() -> None:
    pages = sample(1 << 24)
    assert 7_500 < len(pages) <= 8_192
    assert len(np.unique(pages)) == len(pages)
    assert np.all(np.diff(pages) > 0)
    trace = SimulatedTrace(np.zeros(1, dtype=np.int32), 1, 1.0, 0)
    sampler = Sampler(trace, pages, 1 << 24, Budget(1e-5), np.random.default_rng(0), trace.clock)
    assert sampler.statistics().state < 1 << 20


def test_samples_are_spread_and_whole_pages() -> None:
    assert sample(100).tolist() == list(range(100))
    large = sample(1 << 20, unit=512)
    assert len(large) == 2048
    assert not (large % 512).any()
    halves = np.bincount(sample(1 << 20) >> 19)
    assert halves.min() / halves.max() > 0.9
