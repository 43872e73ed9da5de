"""Pace: how fast the bulk may go so that an urgent page never waits behind it.

What makes a page request slow is not the code at either end but the queue of the slowest link between: a bulk stream
that fills it turns 100 us into milliseconds. So the bulk is paced just below what the link carries, and the kernel does
the pacing (SO_MAX_PACING_RATE, which needs no fq qdisc).

What the link carries is the most goodput that 40 ms have shown: at first the bulk runs free, until that stops growing.
Goodput is counted from the bytes acknowledged, since the kernel's own delivery rate would take a token bucket's burst
for the rate of the link. A single long round trip is no sign of a queue, for acknowledgements also wait for a busy
processor; long ones for several windows in which the link carried less than it was given are. Where round trips are
short the estimate creeps up, to find out when a link has grown faster.
"""

from __future__ import annotations

from collections.abc import Callable

_WINDOW_S = 0.04
_BELOW = 0.92
_CREEP = 1.01
_GROWTH = 1.1
_FLAT_WINDOWS = 2
_QUEUE_US = 4000
"""A smoothed round trip this much above the least one: the queue of a link, not of a processor."""
_QUEUED_WINDOWS = 3
_CLEAR_US = 700


class LinkEstimate:
    """The rate for a paced bulk.

    :param clock: seconds, monotonic.

    Synchronization: one thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._then: tuple[float, int] | None = None
        self._most = 0.0
        self._flat = 0
        self._queued = 0
        self._known = False

    def sample(self, acknowledged: int, rtt_us: int, min_rtt_us: int, *, busy: bool) -> None:
        """Take in what the kernel says of the connection.

        :param acknowledged: bytes acknowledged since it was opened.
        :param busy: whether there was something to send all the while; a window with a pause in it tells nothing.
        """
        now = self._clock()
        if self._then is None or not busy:
            self._then = (now, acknowledged)
            return
        then, before = self._then
        if now - then < _WINDOW_S:
            return
        self._then = (now, acknowledged)
        self._learn((acknowledged - before) / (now - then), rtt_us - min_rtt_us)

    def _learn(self, goodput: float, waited_us: int) -> None:
        if not self._known:
            self._flat = 0 if goodput > self._most * _GROWTH else self._flat + 1
            self._known = self._flat >= _FLAT_WINDOWS
        elif waited_us > _QUEUE_US and goodput < _BELOW * self._most:
            self._queued += 1
            if self._queued >= _QUEUED_WINDOWS:
                self._most, self._queued = goodput / _BELOW, 0
            return
        elif waited_us < _CLEAR_US and goodput > 0.97 * _BELOW * self._most:
            self._most *= _CREEP
        self._queued = 0
        self._most = max(self._most, goodput)

    @property
    def rate(self) -> float | None:
        """Bytes/s for the bulk; None while the link is being measured: as fast as it goes."""
        return self._most * _BELOW if self._known else None
