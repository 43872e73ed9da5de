"""Orders that come while a migration waits for something else."""

from __future__ import annotations

import os
from collections import deque

import pytest

from outboard.errors import CancelledError, UnreachableError
from outboard.migrate.desk import Cancel, Limit, Order, Switch
from outboard.migrate.method import Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.report import Progress, Summary
from outboard.migrate.states import Event, Machine
from outboard.migrate.steering import Steering


class Desk:
    """A commissioner whose orders lie ready."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_SEMAPHORE)
        self.orders: deque[Order] = deque()

    def fileno(self) -> int:
        return self.bell

    def give(self, *orders: Order) -> None:
        self.orders.extend(orders)
        os.eventfd_write(self.bell, len(orders))

    def order(self) -> Order:
        os.eventfd_read(self.bell)
        return self.orders.popleft()

    def report(self, report: Progress | Summary) -> None:
        pass


def steering(options: Options, clock: list[float]) -> tuple[Steering, Desk, Outbox]:
    desk, outbox, machine = Desk(), Outbox(64), Machine()
    machine.on(Event.PREPARE)
    watch = Watch("m1", "web", options, machine, desk, lambda: clock[0], clock[0])
    watch.outbox = outbox
    return Steering(machine, watch, desk, outbox, options, "b"), desk, outbox


def test_limits_change_one_by_one() -> None:
    steered, desk, outbox = steering(Options(max_downtime=0.3), [0.0])
    desk.give(Limit(max_bandwidth=1000))
    steered.wait(0.01)
    assert (outbox.limit, steered.max_downtime) == (1000, 0.3)
    desk.give(Limit(max_downtime=2.0), Limit(max_bandwidth=None))
    steered.until(lambda: not desk.orders, 5)
    assert (outbox.limit, steered.max_downtime) == (None, 2.0)


def test_who_is_told_to_switch_hurries() -> None:
    steered, desk, _ = steering(Options(), [0.0])
    assert not steered.hurried
    desk.give(Switch())
    steered.until(lambda: steered.hurried is not None, 5)


def test_who_has_no_time_left_hurries() -> None:
    clock = [5.0]
    steered, _, _ = steering(Options(timeout=10.0), clock)
    clock[0] = 14.9
    assert not steered.hurried
    clock[0] = 15.0
    assert steered.hurried


def test_a_cancel_ends_the_waiting_and_so_does_silence() -> None:
    steered, desk, _ = steering(Options(), [0.0])
    with pytest.raises(UnreachableError, match="b did not answer within 0 s"):
        steered.until(lambda: False, 0.01)
    desk.give(Cancel())
    with pytest.raises(CancelledError):
        steered.until(lambda: False, 5)
