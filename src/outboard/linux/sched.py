"""sched_setscheduler(2): a thread that must not wait for those that compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator


def prefer_this_process(priority: int = 1) -> bool:
    """Run this process ahead of all ordinary ones (SCHED_RR), for as long as it is awake.

    A cgroup v1 without real-time bandwidth of its own permits no real-time task; there it gets the best nice value.

    :return: whether the kernel permits either (CAP_SYS_NICE); otherwise nothing has changed.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))
    except PermissionError:
        return favour_this_process(-20)
    return True


def favour_this_process(nice: int = -10) -> bool:
    """Let this process go somewhat ahead of its equals, setpriority(2), without starving them.

    :return: whether the kernel permits it (CAP_SYS_NICE); otherwise nothing has changed.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except PermissionError:
        return False
    return True


def favour_no_more(tids: Iterable[int]) -> None:
    """Make threads that inherited a favoured process's nice value ordinary again."""
    for tid in tids:
        with contextlib.suppress(ProcessLookupError):
            if os.getpriority(os.PRIO_PROCESS, tid) < 0:
                os.setpriority(os.PRIO_PROCESS, tid, 0)


@contextlib.contextmanager
def favoured(tids: Iterable[int], nice: int = -15) -> Iterator[None]:
    """Let threads go ahead of their equals for a while, setpriority(2); afterwards each is as it was.

    Where that is not permitted (CAP_SYS_NICE) nothing changes; a thread that has ended is passed over.
    """
    before: dict[int, int] = {}
    for tid in tids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            before[tid] = os.getpriority(os.PRIO_PROCESS, tid)
            os.setpriority(os.PRIO_PROCESS, tid, min(nice, before[tid]))
    try:
        yield
    finally:
        for tid, value in before.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, tid, value)
