"""Going ahead of those that compute."""

from __future__ import annotations

import os

from outboard.linux import sched


def test_this_process_is_preferred_where_that_is_permitted() -> None:
    """In a child: what it says and what it is agree, with and without privileges."""
    for unprivileged in (False, True):
        child = os.fork()
        if child == 0:
            if unprivileged:
                os.setresuid(65534, 65534, 65534)
            said = sched.prefer_this_process()
            os._exit(0 if said == (os.sched_getscheduler(0) == os.SCHED_RR) and not (said and unprivileged) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
