"""Pace: how fast the bulk may go so that an urgent page never waits behind it.

What makes a page request slow is not the code at either end but the queue of the slowest link between: a bulk stream
that fills it turns 100 us into milliseconds. So the bulk is paced just below what the link carries, and the kernel does
the pacing (SO_MAX_PACING_RATE, which needs no fq qdisc).

What the link carries is learned as TCP Vegas learns it. At first the bulk runs free, until goodput stops growing or a
queue stands. Then the pace follows three signs, looked at every 40 ms. Round trips are short: creep up. They are long,
and the goodput is less than the pace: the link carries that much and no more. They are long, though the link carries
what we send: the queue is somebody else's, or an old one of ours; yield a little, to let it drain. Goodput is counted
from the bytes acknowledged: the kernel's own delivery rate would take a token bucket's burst for the rate of the link.
"""

from __future__ import annotations

from collections.abc import Callable

_WINDOW_S = 0.04
_BELOW = 0.95
_CREEP = 1.01
_RECOVER = 1.05
"""The creep while the pace is below what the link has carried before."""
_YIELD = 0.98
_LEAST = 0.8
"""Yielding stops at this share of what the link has carried."""
_SHORT = 0.9
_HOLD_S = 0.5
_GROWTH = 1.1
_QUEUE_US = 1500
"""A smoothed round trip this much above the least one: more than one burst of the sender's own stands in the queue."""
_FLAT_WINDOWS = 2


class LinkEstimate:
    """The rate for a paced bulk.

    :param clock: seconds, monotonic.

    Synchronization: one thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._then: tuple[float, int] | None = None
        self._best = 0.0
        self._flat = 0
        self._link: float | None = None
        self._hold_until = 0.0

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
        self._learn(now, (acknowledged - before) / (now - then), queued=rtt_us > min_rtt_us + _QUEUE_US)

    def _learn(self, now: float, goodput: float, *, queued: bool) -> None:
        if self._link is None:
            self._flat = 0 if goodput > self._best * _GROWTH else self._flat + 1
            self._best = max(self._best, goodput)
            if self._flat >= _FLAT_WINDOWS or (queued and self._flat):
                self._link = self._best
        elif not queued:
            if now >= self._hold_until:
                self._link *= _RECOVER if self._link < self._best else _CREEP
        else:
            self._hold_until = now + _HOLD_S
            if goodput < _SHORT * _BELOW * self._link:
                self._link = max(goodput, self._link / 2)
                self._best = max(self._link, self._best * _YIELD)
            else:
                self._link = max(self._link * _YIELD, _LEAST * self._best)

    @property
    def rate(self) -> float | None:
        """Bytes/s for the bulk; None while the link is being measured: as fast as it goes."""
        return None if self._link is None else self._link * _BELOW
