"""Pace: how fast the bulk may go so that an urgent page never waits behind it.

What makes a page request slow is not the code at either end but the queue of the slowest link between: a bulk stream
that fills it turns 100 us into milliseconds. So the bulk is paced just below what the link carries, and the kernel does
the pacing (SO_MAX_PACING_RATE, which needs no fq qdisc).

What the link carries is the most goodput that 40 ms have shown: at first the bulk runs free, until that stops growing.
Goodput is counted from the bytes acknowledged, since the kernel's own delivery rate would take a token bucket's burst
for the rate of the link. From then on the pace follows round trips, looked at three windows at a time, for one long
round trip may be a busy processor's. Short: creep up, to find out what more the link carries. Long: yield, but not
below nine tenths of what the link has carried. Very long, and less carried than was sent: the link has become slower.
"""

from __future__ import annotations

from collections.abc import Callable

_WINDOW_S, _WINDOW_BYTES, _WINDOW_MOST_S = 0.04, 1 << 20, 1.0
"""A window is at least so long and carries at least so much, for segments are up to 64 KiB; but it ends."""
_LIMITED = 0.8
_FLOOR = 125_000.0
"""Bytes/s: no link that anybody migrates over is slower than a megabit, whatever a window may have shown."""
_BELOW = 0.95
_CREEP = 1.003
_YIELD = 0.99
_LEAST = 0.9
_GROWTH = 1.1
_SHORT_US = 700
_LONG_US = 4000
"""How much a smoothed round trip is above the least one: 700 us is a burst of the sender's own at a gigabit."""
_IN_A_ROW = 3


class LinkEstimate:
    """The rate for a paced bulk.

    :param clock: seconds, monotonic.

    Synchronization: one thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._then: tuple[float, int] | None = None
        self._carried = 0.0
        self._aim: float | None = None
        self._flat = self._short = self._long = 0

    def sample(
        self, acknowledged: int, rtt_us: int, min_rtt_us: int, *, busy: bool, limit: float | None = None
    ) -> None:
        """Take in what the kernel says of the connection.

        :param acknowledged: bytes acknowledged since it was opened.
        :param busy: whether there was something to send all the while; a window with a pause in it tells nothing.
        :param limit: bytes/s that the user allows; a window that carried about that tells nothing either.
        """
        now = self._clock()
        if self._then is None or not busy:
            self._then = (now, acknowledged)
            return
        then, before = self._then
        if now - then < (_WINDOW_S if acknowledged - before >= _WINDOW_BYTES else _WINDOW_MOST_S):
            return
        self._then = (now, acknowledged)
        goodput = (acknowledged - before) / (now - then)
        if limit is None or goodput < _LIMITED * limit:
            self._learn(goodput, rtt_us - min_rtt_us)

    def _learn(self, goodput: float, waited_us: int) -> None:
        if self._aim is None:
            self._flat = 0 if goodput > self._carried * _GROWTH else self._flat + 1
            self._carried = max(self._carried, goodput)
            if self._flat >= _IN_A_ROW:
                self._aim = self._carried
            return
        self._short = self._short + 1 if waited_us < _SHORT_US else 0
        self._long = self._long + 1 if waited_us > _LONG_US else 0
        self._carried = max(self._carried, goodput)
        if self._long >= _IN_A_ROW and goodput < _LEAST * _BELOW * self._aim:
            self._aim = self._carried = max(goodput, _FLOOR)
            self._long = 0
        elif self._short >= _IN_A_ROW:
            self._aim *= _CREEP
        elif waited_us >= _SHORT_US:
            self._aim = max(self._aim * _YIELD, _LEAST * self._carried)

    @property
    def carried(self) -> float | None:
        """Bytes/s that the link has been seen to carry; None while it is being measured."""
        return None if self._aim is None else self._carried

    @property
    def rate(self) -> float | None:
        """Bytes/s for the bulk; None while the link is being measured: as fast as it goes."""
        return None if self._aim is None else self._aim * _BELOW
