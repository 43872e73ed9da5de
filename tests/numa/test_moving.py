"""What rests, and how large a batch may be; the order of batches is tested with the policies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outboard.numa.moving import Pace, Rests


def test_what_moved_back_and_forth_rests_the_longer_the_oftener() -> None:
    rests = Rests(3, window=10)
    units = np.array([0, 1])

    def go(which: NDArray[np.int64], left: int, to: int, now: float) -> list[bool]:
        rests.moved(which, np.full(which.size, left, dtype=np.int16), to, now)
        found: list[bool] = rests.resting(now).tolist()
        return found

    assert go(units, 0, 1, 0) == [False, False, False], "to follow a placement once is no reason to rest"
    assert go(units[:1], 1, 0, 5) == [True, False, False]
    assert rests.resting(14.9).tolist() == [True, False, False]
    assert not rests.resting(15).any()
    assert not go(units[1:], 1, 0, 11)[1], "that was long ago"
    go(units[:1], 0, 1, 14)
    assert rests.resting(33.9).tolist() == [True, False, False]
    assert not rests.resting(34).any()


def test_a_batch_is_as_large_as_the_stall_permits() -> None:
    pace = Pace(longest=0.025, batch=64, most=4096)
    assert pace.took(64, 0.040) == 16
    assert pace.took(16, 0.0) == 16, "it took no longer than what moves nothing"
    assert [pace.took(16, 0.0001), pace.took(25, 0.0001)] == [25, 38]
    for _ in range(40):
        pace.took(pace.batch, pace.batch * 10e-6)
    assert pace.batch == 1000
    assert pace.took(1000, 9.0) == 1
    assert pace.took(0, 1.0) == 1
