"""How hot each unit of a running guest is, by looking at what it touches for a while."""

from __future__ import annotations

import time
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from outboard.numa.policies import Memory
from outboard.pages.heat import Heat
from outboard.trace.touched import TouchTrace
from outboard.vmm.guest import Guest

_DISTANCES = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds between looks: the near ones tell the hottest from the hot, the far ones the warm from the cold."""


def watch(guest: Guest, per: int, seconds: float, *, writes: bool = False) -> Memory:
    """Look for so many seconds; no node is known of any unit yet.

    The guest loses up to 10 us for each page that it touches between two looks.

    :raise RefusedError: as :class:`outboard.trace.touched.TouchTrace`.
    :raise KernelError: the process has ended.
    """
    with TouchTrace(guest, per, writes=writes) as trace:
        began = time.monotonic()
        touched, written = (Heat(guest.pages, max(1.0, seconds), began, per) for _ in range(2))
        for distance in cycle(_DISTANCES):
            time.sleep(max(0.0, min(distance, began + seconds - time.monotonic())))
            found = trace.look()
            now = time.monotonic()
            touched.touch(found.pages, now)
            if found.written is not None:
                written.touch(found.written, now)
            if now - began >= seconds:
                break
    heat = touched.frequencies(now)
    nowhere: NDArray[np.int16] = np.zeros(heat.size, dtype=np.int16)
    return Memory(heat, written.frequencies(now), nowhere)
