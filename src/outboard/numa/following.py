"""Memory follows its vCPUs to a node: batches as :mod:`outboard.numa.moving` orders them, carried out.

Each batch is one call, and its size follows from how long the last took, so that nobody who touches what is being
moved waits longer than permitted. What was busy is tried again in the end; what cannot be moved is counted by the
reason.
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
from outboard.numa.policies import Memory, local_share

_TRIES = 3
_PROBE, _PROBES = 8, 5
"""Batches after which the overhead of a call is measured again, and how many of these count."""
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


class Progress(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-move.v1"):
    """After ``seconds``: units that have come to the node and left it, and that are still to come.

    ``local``: the part of the accesses that are to memory on the node; ``longest``: the longest call, in seconds, of
    which ``overhead``, in the median of late, is spent before anything is moved. ``stayed``: units that could not be
    moved, by reason.
    """

    seconds: float
    moved: int
    left: int
    to_come: int
    local: float
    batches: int
    longest: float
    overhead: float
    stayed: dict[str, int] = {}


class Follower:
    """One guest's way to a node, carried out.

    :param memory: what is known of it; its ``node`` is kept as units move.
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
        self._longest = 0.0
        self._overheads: deque[float] = deque(maxlen=_PROBES)
        self._status: NDArray[np.int32] = np.zeros(memory.node.size, dtype=np.int32)
        mover.plan(memory, rests.resting(self._began))

    def _shift(self, units: NDArray[np.int64], node: int) -> int:
        """Move units, in calls as large as the pace permits; how many have moved."""
        moved = at = 0
        while at < units.size:
            part = units[at : at + self._pace.batch]
            at += part.size
            status, took = self._units.move(part, node)
            if self._batches % _PROBE == 0:
                self._overheads.append(self._units.overhead())
            self._pace.took(part.size, took - statistics.median(self._overheads))
            self._batches += 1
            self._longest = max(self._longest, took)
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
            self._clock() - self._began,
            self._moved,
            self._left,
            self._mover.left,
            local_share(self.memory, self._mover.to),
            self._batches,
            self._longest,
            statistics.median(self._overheads) if self._overheads else 0.0,
            stayed,
        )
