"""Memory follows its vCPUs to a node: batches as :mod:`outboard.numa.moving` orders them, carried out.

Where a unit is, is asked when its turn has come, as far as nobody knows it: what goes first does not wait until all
have been asked about. Each batch is one call, and its size follows from how long the last took, so that nobody who
touches what is being moved waits longer than permitted. What was busy is tried again in the end; what cannot be moved
is counted by the reason.
"""

from __future__ import annotations

import errno
import statistics
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.numa.moving import Mover, Pace, Rests
from outboard.numa.policies import ABSENT, UNKNOWN, Memory, local_share

_TRIES = 3
_PROBES, _PROBING = 5, 0.01
"""How many measurements of a call's overhead are told of, and the part of the time that they may take when all is
well."""
_MOST_ASKED = 1 << 16
"""Units to ask about at once."""
_AGAIN = (-errno.EBUSY, -errno.EAGAIN)
_WHY = {
    -errno.EBUSY: "in use by the kernel",
    -errno.EAGAIN: "not tried",
    -errno.EACCES: "shared with another process",
    -errno.EFAULT: "not movable",
    -errno.ENOENT: "gone meanwhile",
    -errno.ENOMEM: "no memory there",
}


class Units(Protocol):
    """What moves units: :class:`outboard.numa.whereabouts.Whereabouts`, or a model of it."""

    def move(self, units: NDArray[np.int64], node: int) -> tuple[NDArray[np.int32], float]:
        """Where each is now, or a negated errno; and the seconds that it took."""
        ...

    def overhead(self) -> float:
        """Seconds that a call takes which moves nothing, and in which nobody waits."""
        ...

    def nodes(self, units: NDArray[np.int64]) -> NDArray[np.int16]:
        """The node of each, which can be moved from there now; ABSENT for those that are on none."""
        ...


class Progress(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-move.v1"):
    """After ``seconds``: units that have come to ``node`` and left it, and that are still to come or to be asked about.

    ``local``: the part of the accesses that are to memory known to be on the node; ``longest``: the longest call, in
    seconds, of which ``overhead``, in the median of late, is spent before anything is moved; ``stall``: the longest
    without what is spent before, as far as that was measured. ``stayed``: units that could not be moved, by reason.
    """

    node: int
    seconds: float
    moved: int
    left: int
    to_come: int
    local: float
    batches: int
    longest: float
    overhead: float
    stall: float
    stayed: dict[str, int] = {}


class Follower:
    """One guest's way to a node, carried out.

    :param memory: what is known of it; its ``node`` is kept as units are asked about and move.
    :param clock: seconds; :param sleep: until there is something to do again.

    Synchronization: one thread.
    """

    def __init__(
        self,
        units: Units,
        memory: Memory,
        mover: Mover,
        pace: Pace,
        rests: Rests,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._units, self._mover, self._pace, self._rests = units, mover, pace, rests
        self._clock, self._sleep = clock, sleep
        self.memory = memory
        self._began = clock()
        self._moved = self._left = self._batches = self._tries = 0
        self._longest = self._stall = self._overhead = 0.0
        self._overheads: deque[float] = deque(maxlen=_PROBES)
        self._measured = -np.inf
        self._status: NDArray[np.int32] = np.zeros(memory.node.size, dtype=np.int32)
        if mover.policy.until or mover.policy.room:
            # What it does first depends on where all of them are.
            unknown = np.flatnonzero(memory.node == UNKNOWN)
            memory.node[unknown] = units.nodes(unknown)
        mover.plan(memory, rests.resting(self._began))

    def _ask(self) -> None:
        """Ask about the units of the next batch; those that need not move are passed over."""
        most = self._pace.batch
        while True:
            ahead = self._mover.ahead(most)
            unknown = ahead[self.memory.node[ahead] == UNKNOWN]
            if not unknown.size:
                return
            self.memory.node[unknown] = self._units.nodes(unknown)
            found = self.memory.node[ahead]
            needless = (found == self._mover.to) | (found == ABSENT)
            self._mover.skip(ahead, needless)
            if needless.all():
                most = max(most, min(2 * most, _MOST_ASKED))

    def _beside(self, took: float) -> float:
        """Of a call that took so many seconds, those in which nobody waited. Measured again where it cannot be as it
        was: the call was shorter than that, or far too long; else seldom."""
        now = self._clock()
        seldom = now >= self._measured + self._overhead / _PROBING
        if seldom or not self._overhead < took <= self._overhead + self._pace.longest:
            self._overheads.append(self._units.overhead())
            self._overhead, self._measured = min(took, self._overheads[-1]), now
        return self._overhead

    def _shift(self, units: NDArray[np.int64], node: int) -> int:
        """Move units, in calls as large as the pace permits; how many have moved."""
        moved = at = 0
        while at < units.size:
            part = units[at : at + self._pace.batch]
            at += part.size
            status, took = self._units.move(part, node)
            waited = took - self._beside(took)
            self._pace.took(part.size, waited)
            self._batches += 1
            self._longest, self._stall = max(self._longest, took), max(self._stall, waited)
            self._status[part] = np.minimum(status, 0)
            there = part[status == node]
            self._rests.moved(there, self.memory.node[there], node, self._clock())
            self.memory.node[there] = node
            moved += there.size
        return moved

    def _once_more(self) -> bool:
        """Whether what was busy is to be tried again."""
        again = np.isin(self._status, _AGAIN)
        self._tries += 1
        if not again.any() or self._tries >= _TRIES or self._mover.left:
            return False
        resting = (self._status < 0) & ~again
        self._mover.plan(self.memory, resting | self._rests.resting(self._clock()))
        return self._mover.left > 0

    def step(self) -> bool:
        """Carry out one batch, or wait for the next; False: there is none.

        :raise KernelError: the process has ended, or the node may not be used.
        """
        self._mover.limits = msgspec.structs.replace(self._mover.limits, batch=max(1, self._pace.batch))
        self._ask()
        batch = self._mover.next(self._clock())
        if batch is None:
            return self._once_more()
        if not batch.units.size:
            self._sleep(batch.wait)
            return True
        to = self._mover.to
        if batch.leave.size:
            # Each goes where one comes from, and goes first: there is no room before.
            origins = self.memory.node[batch.units[-batch.leave.size :]].copy()
            for node in np.unique(origins).tolist():
                self._left += self._shift(batch.leave[origins == node], node)
        came = self._shift(batch.units, to)
        self._moved += came
        # It has counted them all.
        self._mover.free += batch.units.size - came
        if (self._status[batch.units] == -errno.ENOMEM).any():
            self._mover.free = 0
        return True

    def progress(self) -> Progress:
        """A frozen snapshot."""
        stayed: dict[str, int] = {}
        for status, count in zip(*np.unique(self._status[self._status < 0], return_counts=True), strict=True):
            why = _WHY.get(int(status), errno.errorcode.get(-int(status), str(int(status))))
            stayed[why] = stayed.get(why, 0) + int(count)
        return Progress(
            self._mover.to,
            self._clock() - self._began,
            self._moved,
            self._left,
            self._mover.left,
            local_share(self.memory, self._mover.to),
            self._batches,
            self._longest,
            statistics.median(self._overheads) if self._overheads else 0.0,
            self._stall,
            stayed,
        )
