"""What is looked at how long after it was armed, on a trace that takes its time."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from outboard.numa import warmth
from outboard.trace.touched import TouchTrace


class Slow:
    """A trace of ``units`` that takes ``each`` seconds to arm one."""

    def __init__(self, units: int, each: float) -> None:
        self.units, self.each, self.now = units, each, 0.0
        self.since = np.full(units, np.nan)
        self.calls = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def arm(self, first: int, count: int) -> None:
        self.calls += 1
        self.since[first : first + count] = self.now + self.each * np.arange(count)
        self.now += self.each * count


@pytest.mark.parametrize("armed", warmth._TIMES)
@pytest.mark.parametrize("units", [50, 10_000, 100_000])
def test_all_is_armed_for_about_as_long(monkeypatch: pytest.MonkeyPatch, units: int, armed: float) -> None:
    slow = Slow(units, 2e-6)
    monkeypatch.setattr(warmth, "time", slow)
    seen = []
    lasted = np.full(units, np.nan)
    for first, count in warmth._in_turn(cast(TouchTrace, slow), max(64, units // 128), armed):
        seen.append((first, count))
        lasted[first : first + count] = slow.now - slow.since[first : first + count]
    assert seen[0][0] == 0
    assert [first for first, _ in seen[1:]] == [first + count for first, count in seen[:-1]]
    assert not np.isnan(lasted).any(), "none is left out"
    assert lasted.min() >= armed
    assert lasted.max() <= 2.1 * armed + 2 * 2e-6 * units / 128 + 1e-3
    assert slow.calls <= 160
