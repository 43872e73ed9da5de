"""How hot each unit of a running guest is, by looking at what it touches for a while."""

from __future__ import annotations

import time
from itertools import cycle

import numpy as np

from outboard.numa.policies import UNKNOWN, Memory
from outboard.pages.heat import Heat
from outboard.trace.touched import TouchTrace
from outboard.vmm.guest import Guest

_TIMES = (0.002, 0.512, 0.008, 0.128, 0.032)
"""Seconds that memory is armed: short ones tell the hottest from the hot, long ones the warm from the cold."""
_ROUND_S = 0.25
"""What the short times together may take: for those memory is armed part by part."""
_MOST_PARTS = 64


def watch(guest: Guest, per: int, seconds: float, *, writes: bool = False) -> Memory:
    """Look for so many seconds; the node of each unit is :data:`UNKNOWN` then.

    The guest loses up to 10 us for each page that it touches after it was armed.

    :raise RefusedError: as :class:`outboard.trace.touched.TouchTrace`.
    :raise KernelError: the process has ended.
    """
    with TouchTrace(guest, per, writes=writes) as trace:
        began = now = time.monotonic()
        touched, written = (Heat(guest.pages, max(1.0, seconds), began, per) for _ in range(2))
        for armed in cycle(_TIMES):
            parts = max(1, min(_MOST_PARTS, int(_ROUND_S / armed), trace.units))
            size = -(-trace.units // parts)
            for first in range(0, trace.units, size):
                count = min(size, trace.units - first)
                trace.arm(first, count)
                time.sleep(max(0.0, min(armed, began + seconds - time.monotonic())))
                found = trace.seen(first, count)
                now = time.monotonic()
                touched.touch(found.pages, now)
                if found.written is not None:
                    written.touch(found.written, now)
            # Of all memory alike: a round that has begun is finished.
            if now - began >= seconds:
                break
    heat = touched.frequencies(now)
    return Memory(heat, written.frequencies(now), np.full(heat.size, UNKNOWN, dtype=np.int16))
