"""Going ahead of those that compute."""

from __future__ import annotations

import os
import subprocess

from outboard.linux import pidfd, sched
from tests.support.requirements import require


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


def test_threads_that_are_favoured_for_a_while_are_as_they_were() -> None:
    require("root")
    child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.nice(3))  # one thread, one call
    try:
        with sched.favoured([child.pid, 1 << 22]):
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == -15
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == 3
        os.setpriority(os.PRIO_PROCESS, child.pid, -20)
        with sched.favoured([child.pid]):
            assert os.getpriority(os.PRIO_PROCESS, child.pid) == -20
    finally:
        child.kill()
        child.wait()


def test_a_thread_that_ends_while_it_is_favoured() -> None:
    require("root")
    child = subprocess.Popen(["sleep", "60"])
    with sched.favoured([child.pid]):
        child.kill()
        child.wait()
    assert not pidfd.alive(child.pid)


def test_what_was_inherited_is_taken_back_and_a_choice_is_kept() -> None:
    require("root")
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        os.setpriority(os.PRIO_PROCESS, children[0].pid, -10)
        os.setpriority(os.PRIO_PROCESS, children[1].pid, 5)
        sched.favour_no_more([1 << 22, *(child.pid for child in children)])
        assert [os.getpriority(os.PRIO_PROCESS, child.pid) for child in children] == [0, 5]
    finally:
        for child in children:
            child.kill()
            child.wait()
