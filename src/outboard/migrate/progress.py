"""Progress: what is left, how fast it goes, and when it will end, as a range; the bar never runs backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from outboard.migrate.desk import Desk
from outboard.migrate.method import Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.report import Progress, verdict
from outboard.migrate.states import Machine, State
from outboard.pages import PAGE_SIZE

_EVERY_S = 0.2
_WINDOW = 10
_STANDSTILL = frozenset({State.SWITCHING, State.COMMITTED})
"""The guest stands still: nobody counts its pages meanwhile."""


class Copying(Protocol):
    """What is to be seen of :class:`outboard.migrate.rounds.Rounds`."""

    @property
    def dirty_rate(self) -> float | None:
        """Bytes/s that the guest writes."""

    @property
    def held(self) -> str | None:
        """Who is held back, in words."""


class Watch:
    """Looks at an outbox five times a second and reports.

    :param clock: seconds, monotonic.
    :param began: when the command came, by that clock.
    """

    def __init__(
        self,
        migration: str,
        vm: str,
        options: Options,
        machine: Machine,
        desk: Desk,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        self._migration = migration
        self._vm = vm
        self._options = options
        self._machine = machine
        self._desk = desk
        self._clock = clock
        self._began = began
        self._next = 0.0
        self._fraction = 0.0
        self._live = self._unsent = 0
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self.outbox: Outbox | None = None
        self.rounds: Copying | None = None
        self.broken: str | None = None
        """Why the streams broke off, while they are being opened again."""

    @property
    def elapsed(self) -> float:
        """Seconds since the command."""
        return self._clock() - self._began

    def look(self, *, at_once: bool = False) -> None:
        """Report, if it is time to (or ``at_once``)."""
        now = self._clock()
        if now < self._next and not at_once:
            return
        self._next = now + _EVERY_S
        self._desk.report(self._progress(now))

    def _progress(self, now: float) -> Progress:
        outbox = self.outbox
        sent_bytes = content = remaining = total = 0
        if outbox is not None:
            sent = outbox.statistics()
            sent_bytes, content = sent.bulk_bytes + sent.urgent_bytes, sent.content_bytes
            if self._machine.state not in _STANDSTILL:
                self._live, self._unsent = len(outbox.live()), len(outbox.unsent())
            total, remaining = self._live * PAGE_SIZE, self._unsent * PAGE_SIZE
        # Of pages, not of what they are packed into: what remains and what the guest writes are pages.
        self._seen.append((now, content))
        (then, before), (_, after) = self._seen[0], self._seen[-1]
        rate = (after - before) / (now - then) if now > then else 0.0
        if total:
            self._fraction = max(self._fraction, 1 - remaining / total)
        written, held = (None, None) if self.rounds is None else (self.rounds.dirty_rate, self.rounds.held)
        return Progress(
            migration=self._migration,
            vm=self._vm,
            state=self._machine.state,
            safe_at=self._machine.safe_at,
            elapsed=now - self._began,
            fraction=self._fraction,
            remaining_bytes=remaining,
            sent_bytes=sent_bytes,
            rate=rate,
            dirty_rate=written,
            eta=self._eta(remaining, rate, written or 0.0),
            verdict=self.broken or held or verdict(written, rate, resumes_early=self._options.method.resumes_early),
        )

    def _eta(self, remaining: int, rate: float, dirty_rate: float) -> tuple[float, float] | None:
        """At best the present rate holds and part of the rest is zeros; at worst the guest keeps writing."""
        if not rate:
            return None
        written = 0.0 if self._options.method.resumes_early else dirty_rate
        if written >= 0.95 * rate:
            return None
        return 0.8 * remaining / rate, 1.2 * remaining / (rate - written)
