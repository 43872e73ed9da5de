"""The guest's processor time goes on between the kernel's ticks, and never by more than one."""

from __future__ import annotations

import time

import numpy as np

from outboard.trace.running import Running, follow, ran
from tests.support.target import Target

ROOM = np.zeros(2, dtype=np.int64)


def test_it_goes_on_between_ticks() -> None:
    with Target(mebibytes=1, threads=1) as target:
        running = Running(target.pid)
        tick = int(running.seen[2])
        assert 1_000_000 <= tick <= 10_000_000
        target.ask("g")
        shown = set()
        end = time.monotonic_ns() + 20 * tick
        while (now := time.monotonic_ns()) < end:
            found = follow(running.clock, running.seen, now, ROOM)
            assert found - tick <= int(running.seen[0]) <= found
            assert ran(running.clock, running.seen, now, ROOM) >= int(running.seen[0])
            shown.add(found)
        target.ask("s")
        # More moments than ticks: in how many it is looked at is the machine's affair.
        assert len(shown) > 21


def test_a_guest_that_sleeps_does_not_age() -> None:
    with Target(mebibytes=1) as target:
        running = Running(target.pid)
        follow(running.clock, running.seen, time.monotonic_ns(), ROOM)
        first = ran(running.clock, running.seen, time.monotonic_ns() + 10**9, ROOM)
        assert first == ran(running.clock, running.seen, time.monotonic_ns() + 10**10, ROOM)


def test_a_stale_note_is_not_used() -> None:
    with Target(mebibytes=1) as target:
        running = Running(target.pid)
        now = time.monotonic_ns()
        shown = follow(running.clock, running.seen, now, ROOM)
        running.seen[0] = shown - 1
        assert ran(running.clock, running.seen, now + 10**9, ROOM) == shown
