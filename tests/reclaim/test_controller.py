"""A VM that is reclaimed, simulated: its working set stays, and what is idle goes."""

from __future__ import annotations

import random

import pytest

from outboard.reclaim.controller import MIB, Controller, Reading

PAGE = 4096
MEMORY = 1024 * MIB


class Simulated:
    """A VM that touches ``working`` pages at random; the coldest go first, and come back when they are touched."""

    def __init__(self, working: int, touches: int = 4000) -> None:
        self.working, self.touches = working, touches
        self.away_idle = self.away_used = 0
        self.refaults = 0
        self.chance = random.Random(1)

    def take(self, pages: int) -> None:
        idle = min(pages, MEMORY // PAGE - self.working - self.away_idle)
        self.away_idle += idle
        self.away_used = min(self.working, self.away_used + pages - idle)

    def second(self) -> None:
        expected = self.touches * self.away_used / max(1, self.working)
        came = min(self.away_used, int(expected) + (self.chance.random() < expected % 1))
        self.away_used -= came
        self.refaults += came

    def resident(self) -> int:
        return MEMORY - (self.away_idle + self.away_used) * PAGE

    def reading(self, now: float) -> Reading:
        return Reading(now, MEMORY, self.resident(), self.refaults)


def run(controller: Controller, vm: Simulated, seconds: int, since: int = 0) -> list[int]:
    """Refaults of each second."""
    rates = []
    for second in range(since, since + seconds):
        before = vm.refaults
        vm.take(controller.step(vm.reading(float(second))) // PAGE)
        vm.second()
        rates.append(vm.refaults - before)
    return rates


def test_what_is_idle_goes_until_the_target_and_no_further() -> None:
    vm = Simulated(working=100 * MIB // PAGE)
    controller = Controller(target=300 * MIB)
    rates = run(controller, vm, 120)
    assert vm.resident() == 300 * MIB
    assert max(rates) == 0
    assert not controller.backs_off


def test_a_working_set_is_left_where_the_target_is_below_it() -> None:
    vm = Simulated(working=500 * MIB // PAGE)
    controller = Controller(target=200 * MIB, most_refaults=200)
    rates = run(controller, vm, 1800)
    assert controller.backs_off
    assert vm.resident() > 450 * MIB
    # It is tried now and then, ever more rarely, and mostly it is calm.
    late = rates[900:]
    assert sum(rate > 200 for rate in late) < len(late) / 20
    assert vm.resident() < 600 * MIB


def test_a_working_set_that_shrinks_is_followed() -> None:
    vm = Simulated(working=500 * MIB // PAGE)
    controller = Controller(target=200 * MIB)
    run(controller, vm, 600)
    vm.working, vm.away_idle, vm.away_used = 100 * MIB // PAGE, vm.away_idle + vm.away_used, 0
    run(controller, vm, 1200, since=600)
    assert vm.resident() == pytest.approx(200 * MIB, abs=MIB)
    assert not controller.backs_off


def test_nothing_is_taken_while_much_comes_back() -> None:
    controller = Controller(target=0, most_refaults=100)
    refaults = 0
    took = []
    for second in range(60):
        refaults += 500
        took.append(controller.step(Reading(float(second), MEMORY, MEMORY // 2, refaults)))
    assert took == [0] * 60


def test_a_clock_that_stands_still_takes_nothing() -> None:
    controller = Controller(target=0)
    assert controller.step(Reading(1.0, MEMORY, MEMORY, 0)) == 0
    assert controller.step(Reading(1.0, MEMORY, MEMORY, 0)) == 0
    assert controller.step(Reading(2.0, MEMORY, MEMORY, 0)) == 4 * MIB
    assert controller.step(Reading(3.0, MEMORY, MEMORY, 0)) == 8 * MIB
