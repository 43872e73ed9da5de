"""On how many connections the bulk goes.

One connection is one process at each end, which reads, encrypts, receives and places 0.5 to 1 GB/s on one processor.
More are of use only where the link carries more than that, and where processors are free for them: half of this host's,
at most four, and one where the link carries 1 Gbit/s or less, by what its interface or the user says.
"""

from __future__ import annotations

import os

from outboard.errors import KernelError
from outboard.linux import interfaces
from outboard.migrate.method import Options

_MOST = 4
_ONE_IS_ENOUGH = 1_000_000_000
"""Bit/s."""


def suggested(options: Options, address: str) -> int:
    """How many to use on the way to ``address``."""
    if options.max_bandwidth is not None and 8 * options.max_bandwidth <= _ONE_IS_ENOUGH:
        return 1
    carries = _speed(address)
    if carries is not None and carries <= _ONE_IS_ENOUGH:
        return 1
    return max(1, min(_MOST, len(os.sched_getaffinity(0)) // 2))


def _speed(address: str) -> int | None:
    name = interfaces.towards(address)
    try:
        return None if name is None else interfaces.speed(name)
    except KernelError:
        # It went away meanwhile, or /sys shows another network namespace.
        return None
