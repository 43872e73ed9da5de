"""sched_setscheduler(2): a thread that must not wait for those that compute."""

from __future__ import annotations

import os


def prefer_this_process(priority: int = 1) -> bool:
    """Run this process ahead of all ordinary ones (SCHED_RR), for as long as it is awake.

    :return: whether the kernel permits it (CAP_SYS_NICE); otherwise nothing has changed.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))
    except PermissionError:
        return False
    return True
