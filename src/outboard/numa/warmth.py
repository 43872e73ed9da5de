"""How hot each unit of a running guest is, by looking at what it touches for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import cycle

import numpy as np

from outboard.numa.policies import UNKNOWN, Memory
from outboard.pages.heat import Heat
from outboard.trace.touched import TouchTrace
from outboard.vmm.guest import Guest

_TIMES = (0.032, 0.128, 0.008, 0.512, 0.002)
"""Seconds that a unit is armed: short ones tell the hottest from the hot, long ones the warm from the cold. Of a guest
that is so large that time is left for one of them only, the first one tells most."""
_LEAST_S = 0.25
"""Seconds of a round at the least, so that small guests are not armed again and again."""
_LEAST, _PARTS, _STOPS = 64, 128, 16
"""Units that are armed at once at the least; in how many parts memory is armed at most, and where each is a stop."""


def watch(guest: Guest, per: int, seconds: float, *, writes: bool = False) -> Memory:
    """Look for so many seconds; the node of each unit is :data:`UNKNOWN` then.

    The guest loses up to 10 us for each page that it touches after it was armed.

    :raise RefusedError: as :class:`outboard.trace.touched.TouchTrace`.
    :raise KernelError: the process has ended.
    """
    with TouchTrace(guest, per, writes=writes) as trace:
        began = now = time.monotonic()
        touched, written = (Heat(guest.pages, max(1.0, seconds), began, per) for _ in range(2))
        least = max(_LEAST, -(-trace.units // (_STOPS if trace.stops else _PARTS)))
        for armed in cycle(_TIMES):
            entered = now
            for first, count in _in_turn(trace, least, min(armed, seconds)):
                found = trace.seen(first, count)
                now = time.monotonic()
                touched.touch(found.pages, now)
                if found.written is not None:
                    written.touch(found.written, now)
            # Of all memory alike: a round that has begun is finished.
            if now - began >= seconds:
                break
            time.sleep(max(0.0, min(entered + _LEAST_S, began + seconds) - now))
    heat = touched.frequencies(now)
    return Memory(heat, written.frequencies(now), np.full(heat.size, UNKNOWN, dtype=np.int16))


def _in_turn(trace: TouchTrace, least: int, armed: float) -> Iterator[tuple[int, int]]:
    """Arm all memory part by part, and tell the first unit and the size of each part that has been armed for so long.

    Arming takes longer than the shortest times: were all armed and then looked at, what comes first would be armed for
    longest, and seem hotter than the rest. So a part is as large as can be armed in half of the time.
    """
    waiting: deque[tuple[float, int, int]] = deque()
    first, size = 0, least
    while first < trace.units:
        while waiting and time.monotonic() >= waiting[0][0]:
            yield waiting.popleft()[1:]
        count = min(size, trace.units - first)
        began = time.monotonic()
        trace.arm(first, count)
        now = time.monotonic()
        waiting.append((now + armed, first, count))
        first += count
        size = max(least, int(count * armed / 2 / max(now - began, 1e-6)))
    for due, first, count in waiting:
        time.sleep(max(0.0, due - time.monotonic()))
        yield first, count
