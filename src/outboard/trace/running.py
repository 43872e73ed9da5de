"""How long a guest has run, between the kernel's ticks.

Of a process that is not ours the kernel tells the processor time as it last counted it: at a tick of the processor that
runs it, 1 to 10 ms apart, or when it left one. Whoever asks often sees the moment at which it counts, and may add what
has passed since, up to a tick: right while the guest runs, and at most a tick too much when it has just been taken off.

Source: kernel/sched/cputime.c, thread_group_cputime(); clock_getres(2) of CLOCK_MONOTONIC_COARSE tells the tick.
"""

from __future__ import annotations

import time

import numpy as np
from numba import njit
from numpy.typing import NDArray

from outboard.linux import cpuclock, native
from outboard.pages.shared import publish

_CLOCK_MONOTONIC_COARSE = 6
_SHOWN, _SINCE, _TICK = range(3)


@njit("int64(int32, int64[::1], int64, int64[::1])", cache=True, nogil=True)
def ran(clock: int, seen: NDArray[np.int64], now: int, room: NDArray[np.int64]) -> int:
    """For how long the guest of ``clock`` has run at ``now``, in nanoseconds; from compiled code.

    :param seen: what :func:`follow` has seen; :param room: two int64.
    """
    # The order in which they are written is the other one.
    before = seen[_SHOWN]
    since = seen[_SINCE]
    shown = native.clock_ns(clock, room)
    return shown if shown != before else shown + max(0, min(now - since, seen[_TICK]))


@njit("int64(int32, int64[::1], int64, int64[::1])", cache=True, nogil=True)
def follow(clock: int, seen: NDArray[np.int64], now: int, room: NDArray[np.int64]) -> int:
    """As :func:`ran`, for the one thread that asks often: it notes when the kernel counts."""
    shown = native.clock_ns(clock, room)
    if shown != seen[_SHOWN]:
        seen[_SINCE] = now
        publish(seen, _SHOWN, shown)  # type: ignore[call-arg]  # numba passes one
    return shown + max(0, min(now - seen[_SINCE], seen[_TICK]))  # type: ignore[no-any-return]


class Running:
    """The processor time of process ``pid``.

    Synchronization: one thread follows, any reads.
    """

    def __init__(self, pid: int) -> None:
        self.clock = cpuclock.of(pid)
        tick = round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)
        self.seen: NDArray[np.int64] = np.array([0, 0, tick], dtype=np.int64)
