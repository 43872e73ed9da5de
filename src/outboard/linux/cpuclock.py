"""clock_getcpuclockid(3): the processor time that another process has used, in user space, kernel and guest."""

from __future__ import annotations

import errno
import time

from outboard.errors import KernelError

_CPUCLOCK_SCHED = 2
"""<linux/posix-timers_types.h>: the scheduler's count, to the nanosecond, of a whole thread group."""


def of(pid: int) -> int:
    """The clock of process ``pid``, as :func:`read` and clock_gettime(2) take it."""
    return ~pid << 3 | _CPUCLOCK_SCHED


def read(clock: int) -> int:
    """What a clock shows, in nanoseconds.

    :raise KernelError: ESRCH: the process has ended, for which the kernel's word is EINVAL.
    """
    try:
        return time.clock_gettime_ns(clock)
    except OSError as error:
        number = errno.ESRCH if error.errno == errno.EINVAL else error.errno or 0
        raise KernelError(f"clock_gettime of the processor time of process {~(clock >> 3)}", number) from error
