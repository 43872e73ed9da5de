"""System calls made in another process."""

from __future__ import annotations

import errno
import os
import signal

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import proc, ptrace
from outboard.linux.ptrace import Stopped
from tests.support.target import Target

SYS_getpid = 39
SYS_gettid = 186
SYS_madvise = 28


def test_a_call_runs_in_the_thread_that_was_stopped() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        assert target.ask("r 3") == "3"


def test_another_thread_can_be_chosen() -> None:
    with Target() as target:
        target.ask("g")
        other = next(thread.tid for thread in proc.threads(target.pid) if thread.tid != target.pid)
        with Stopped(target.pid, other) as stopped:
            assert stopped.syscall("gettid", SYS_gettid) == other
        assert target.ask("s").startswith("bad 0 of")


def test_a_failing_call_tells_its_errno() -> None:
    with Target() as target, Stopped(target.pid) as stopped:
        with pytest.raises(KernelError, match="close") as caught:
            stopped.syscall("close of descriptor 999", ptrace.SYS_close, 999)
        assert caught.value.errno == errno.EBADF


def test_thousands_of_calls_in_one_stop() -> None:
    with Target() as target:
        calls = np.zeros((5000, 7), dtype=np.int64)
        calls[:, 0] = SYS_getpid
        calls[7] = [ptrace.SYS_close, 999, 0, 0, 0, 0, 0]
        with Stopped(target.pid) as stopped:
            results = stopped.batch(calls)
        assert results[7] == -errno.EBADF
        assert set(np.delete(results, 7).tolist()) == {target.pid}
        before = len(proc.maps(target.pid))
        with Stopped(target.pid) as stopped:
            assert stopped.batch(np.empty((0, 7), dtype=np.int64)).size == 0
        assert len(proc.maps(target.pid)) == before


def test_writers_lose_nothing_to_hundreds_of_stops_and_signals() -> None:
    with Target() as target:
        target.ask("g")
        for _ in range(300):
            os.kill(target.pid, signal.SIGUSR1)
            with Stopped(target.pid) as stopped:
                stopped.syscall("getpid", SYS_getpid)
        assert target.ask("s").startswith("bad 0 of")
        assert int(target.ask("k")) >= 1


def test_a_signal_that_comes_while_stopped_is_delivered_afterwards() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            os.kill(target.pid, signal.SIGUSR1)
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        assert target.ask("k") == "1"


def test_an_injected_userfaultfd_stays_open_inside_and_can_be_closed() -> None:
    with Target() as target:
        ours, theirs = ptrace.inject_userfaultfd(target.pid)
        os.close(ours)
        assert "userfaultfd" in proc.descriptors(target.pid)[theirs]
        ptrace.close_in_target(target.pid, theirs)
        assert theirs not in proc.descriptors(target.pid)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(KernelError):
        Stopped(2**22 + 1)


def test_a_process_that_dies_while_stopped() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            os.kill(target.pid, signal.SIGKILL)
            with pytest.raises(KernelError) as caught:
                stopped.syscall("getpid", SYS_getpid)
        assert caught.value.errno == errno.ESRCH
