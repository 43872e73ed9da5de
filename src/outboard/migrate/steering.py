"""Steering: the one thread of a migration's source waits here for whoever has something to say."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Mapping

import msgspec

from outboard.errors import CancelledError, UnreachableError
from outboard.migrate.desk import Cancel, Desk, Limit, Switch
from outboard.migrate.method import Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.states import Event, Machine

STEP_S = 30.0
"""The longest that any one answer of the peer may take."""
_TICK_S = 0.05

Speakers = Mapping[int, Callable[[], None]]
"""Descriptors that are readable when there is something to take in, and what takes it in."""


class Steering:
    """Waits, hears the user's orders meanwhile, and moves the migration on.

    :param options: as the user gave them; ``max_downtime`` is what became of that one. :param peer: the destination's
        name.

    Synchronization: one thread.
    """

    def __init__(self, machine: Machine, watch: Watch, desk: Desk, outbox: Outbox, options: Options, peer: str) -> None:
        self.machine = machine
        self.cancelled = False
        self.max_downtime = options.max_downtime
        self._timeout, self._told_to_switch = options.timeout, False
        self._watch, self._desk, self._outbox, self._peer = watch, desk, outbox, peer
        self._sources: list[Callable[[], Speakers]] = [lambda: {self._desk.fileno(): self._take_order}]

    def listen(self, speakers: Callable[[], Speakers]) -> None:
        """Ask ``speakers`` at each turn whom to listen to; a descriptor of -1 is nobody's."""
        self._sources.append(speakers)

    def on(self, event: Event) -> None:
        """Move the migration on, and report it."""
        self.machine.on(event)
        self._watch.look(at_once=True)

    @property
    def hurried(self) -> str | None:
        """Why to copy no longer and switch over, in words; None: go on."""
        if self._told_to_switch:
            return "the user had it switch over"
        if self._timeout is not None and self._watch.elapsed >= self._timeout:
            return f"its time was over (--timeout {self._timeout:g})"
        return None

    def until(self, ready: Callable[[], bool], timeout: float | None) -> None:
        """Take in whatever anybody says until ``ready``.

        :raise UnreachableError: ``timeout`` seconds have passed.
        :raise CancelledError: the user has said so, and it is not too late.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            self._turn()
            if deadline is not None and time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self._peer} did not answer within {timeout:.0f} s while the migration was "
                    f"{self.machine.state.value}"
                )

    def wait(self, seconds: float) -> None:
        """Take in whatever anybody says for a while."""
        over = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= over, None)

    def _turn(self) -> None:
        speakers = {fd: take for source in self._sources for fd, take in source().items() if fd >= 0}
        for fd in select.select(list(speakers), [], [], _TICK_S)[0]:
            speakers[fd]()
        self._watch.look()
        if self.cancelled and self.machine.accepts(Event.CANCEL):
            raise CancelledError("cancelled; the VM runs at the source")

    def _take_order(self) -> None:
        match self._desk.order():
            case Cancel():
                self.cancelled = True
            case Switch():
                self._told_to_switch = True
            case Limit(max_bandwidth, max_downtime):
                if max_bandwidth is not msgspec.UNSET:
                    self._outbox.limit = max_bandwidth
                if max_downtime is not msgspec.UNSET:
                    self.max_downtime = max_downtime
