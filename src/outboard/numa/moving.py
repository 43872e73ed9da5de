"""What to move next, by a policy: batches, what makes room for them, what rests, and how large a batch may be.

Nothing here knows more than it is given, the clock included, so that a simulation and a host run the same code.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.numa.policies import ABSENT, Memory, Policy, order_of

_HOTTER = 2.0
"""How many times hotter a unit must be than the one that makes room for it."""
_MOST_RETURNS = 10
_AIM = 0.4
"""The part of the longest permitted stall that a batch is to take."""


class Batch(NamedTuple):
    """Units to move to the node, and those that leave it before; nothing and a time in seconds to wait for."""

    units: NDArray[np.int64]
    leave: NDArray[np.int64]
    wait: float = 0.0


class Limits(msgspec.Struct, frozen=True):
    """``tail``: units per second in the background."""

    batch: int = 64
    tail: float = 64.0


_NONE: NDArray[np.int64] = np.empty(0, dtype=np.int64)


class Mover:
    """One guest's way to a node: ``plan`` when heat is known anew, ``next`` for each batch.

    :param free: the units of free memory that the node has.

    Synchronization: none.
    """

    def __init__(self, policy: Policy, to: int, limits: Limits, free: int) -> None:
        self.policy, self.to, self.limits, self.free = policy, to, limits, free
        self._order, self._hot, self._at = _NONE, 0, 0
        self._leaving = _NONE
        self._heat: NDArray[np.float64] = np.empty(0)
        self._remote = self._total = 0.0
        self._tail_from = -np.inf

    def plan(self, memory: Memory, resting: NDArray[np.bool_] | None = None) -> None:
        """Order what is left to move; units that are ``resting`` stay where they are."""
        rests = np.zeros(memory.node.size, dtype=np.bool_) if resting is None else resting
        self._order, self._hot = order_of(self.policy, memory, self.to, rests)
        self._at = 0
        self._heat = memory.heat
        self._total = float(memory.heat.sum())
        self._remote = self._total - float(memory.heat[memory.node == self.to].sum())
        if self.policy.tail == "stay":
            self._order = self._order[: self._hot]
        if self.policy.room:
            there = np.flatnonzero((memory.node == self.to) & ~rests)
            self._leaving = there[np.argsort(memory.heat[there], kind="stable")]

    @property
    def left(self) -> int:
        """Units that are still to be moved, or asked about."""
        return self._order.size - self._at

    def ahead(self, most: int) -> NDArray[np.int64]:
        """The units that are next, at most so many of them."""
        end = self._hot if self._at < self._hot else self._order.size
        return self._order[self._at : min(end, self._at + most)]

    def skip(self, units: NDArray[np.int64], needless: NDArray[np.bool_]) -> None:
        """Of the ``units`` that are next, those that ``needless`` marks need not move after all."""
        end, self._at = self._at + units.size, self._at + int(np.count_nonzero(needless))
        self._order[self._at : end] = units[~needless]

    def _leave(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of ``wanted`` those that there is room for, and the colder ones that make it."""
        room = self.free
        if wanted.size <= room or not self.policy.room:
            return wanted[:room], _NONE
        hotter, colder = wanted[room:], self._leaving[: wanted.size - room]
        hotter = hotter[: colder.size]
        # The hottest against the coldest: once a pair is not worth it, none after it is.
        worth = self._heat[hotter] > _HOTTER * self._heat[colder]
        pairs = colder.size if worth.all() else int(np.argmin(worth))
        return wanted[: room + pairs], colder[:pairs]

    def next(self, now: float) -> Batch | None:
        """What to move next; it counts as moved. None: nothing is left to do, or there is no room for it.

        :param now: seconds, from any origin.
        """
        if self.left == 0 or (self.policy.until and self._remote <= self.policy.until * self._total):
            return None
        most = self.limits.batch
        if self._at < self._hot:
            most = min(most, self._hot - self._at)
        elif self.policy.tail == "idle":
            if now < self._tail_from:
                return Batch(_NONE, _NONE, self._tail_from - now)
            self._tail_from = now + min(most, self.left) / self.limits.tail
        wanted, leave = self._leave(self._order[self._at : self._at + most])
        if not wanted.size:
            return None
        self._at += wanted.size
        self.free -= wanted.size - leave.size
        self._leaving = self._leaving[leave.size :]
        self._remote += float(self._heat[leave].sum()) - float(self._heat[wanted].sum())
        return Batch(wanted, leave)


class Rests:
    """Which units moved back and forth lately: each return lets a unit rest, twice as long as the one before.

    :param window: seconds within which coming back counts as a return, and of the first rest.

    Synchronization: none.
    """

    def __init__(self, units: int, window: float) -> None:
        self.window = window
        self._left_node: NDArray[np.int16] = np.full(units, ABSENT, dtype=np.int16)
        self._moved: NDArray[np.float64] = np.full(units, -np.inf)
        self._until: NDArray[np.float64] = np.full(units, -np.inf)
        self._returns: NDArray[np.uint8] = np.zeros(units, dtype=np.uint8)

    def moved(self, units: NDArray[np.int64], left: NDArray[np.int16], to: int, now: float) -> None:
        """Note that units moved from the nodes they were on."""
        back = units[(self._left_node[units] == to) & (now - self._moved[units] < self.window)]
        self._until[back] = now + self.window * 2.0 ** self._returns[back]
        self._returns[back] = np.minimum(self._returns[back] + 1, _MOST_RETURNS)
        self._left_node[units], self._moved[units] = left, now

    def resting(self, now: float) -> NDArray[np.bool_]:
        """The units that stay where they are for now."""
        return self._until > now


class Pace:
    """How many units a batch may have so that none of its accesses waits longer than ``longest`` seconds.

    Aims at two fifths of it, since one batch may take twice as long as the next; grows by half a batch at most, and
    shrinks at once, to ``least`` at the least.

    Synchronization: none.
    """

    def __init__(self, longest: float, batch: int, most: int, least: int = 1) -> None:
        self.longest, self.batch, self.most, self.least = longest, batch, most, least

    def took(self, units: int, seconds: float) -> int:
        """Note how long a batch took, beside what a call of any size takes; the size of the next.

        One that took no longer than any call teaches nothing.
        """
        if units > 0 and seconds > 0:
            fitting = int(units * self.longest * _AIM / seconds)
            self.batch = max(self.least, min(fitting, self.batch + self.batch // 2 + 1, self.most))
        return self.batch
