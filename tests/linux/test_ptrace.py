"""System calls made in another process."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import pidfd, proc, ptrace
from outboard.linux.libc import libc
from outboard.linux.ptrace import Stopped
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from tests.support.requirements import require
from tests.support.target import Target

SYS_poll = 7
SYS_getpid = 39
SYS_gettid = 186
SYS_getppid = 110
SYS_kill = 62
SYS_mprotect = 10


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
        assert int(target.ask("k").split()[0]) >= 1


def test_batches_are_not_disturbed_by_signals() -> None:
    with Target() as target:
        target.ask("g")
        calls = np.tile(np.array([SYS_getpid, 0, 0, 0, 0, 0, 0], dtype=np.int64), (2000, 1))
        for _ in range(50):
            with Stopped(target.pid) as stopped:
                os.kill(target.pid, signal.SIGUSR1)
                assert set(stopped.batch(calls).tolist()) == {target.pid}
        assert target.ask("s").startswith("bad 0 of")


def test_a_signal_that_comes_while_stopped_is_delivered_afterwards_with_what_it_carries() -> None:
    with Target(threads=0) as target:
        with Stopped(target.pid) as stopped:
            assert libc.sigqueue(target.pid, signal.SIGUSR1, ctypes.c_void_p(4711)) == 0
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
            assert pending(target) & 1 << signal.SIGUSR1 - 1
        assert target.ask("k") == "1 4711"


def test_a_signal_that_comes_before_the_thread_has_stopped_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ptrace._ptrace

    def late(operation: str, request: int, tid: int, address: int = 0, data: int = 0) -> None:
        if operation == "INTERRUPT":
            os.kill(tid, signal.SIGUSR1)
            proc.wait_stopped(tid)
        call(operation, request, tid, address, data)

    monkeypatch.setattr(ptrace, "_ptrace", late)
    with Target(threads=0) as target:
        with Stopped(target.pid) as stopped:
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        assert target.ask("k").split()[0] == "1"


def pending(target: Target) -> int:
    return int(status(target)["ShdPnd"], 16)


def status(target: Target) -> dict[str, str]:
    lines = Path(f"/proc/{target.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_masks_and_handlers_are_as_they_were() -> None:
    with Target() as target:
        target.ask("b")
        before = status(target)
        assert int(before["SigBlk"], 16) & 1 << signal.SIGTRAP - 1
        with Stopped(target.pid) as stopped:
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        after = status(target)
        for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"):
            assert after[name] == before[name]


def test_a_foreign_trap_is_not_taken_for_the_end_of_a_call() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            os.kill(target.pid, signal.SIGTRAP)
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
            assert stopped.syscall("gettid", SYS_gettid) == target.pid
        process = pidfd.open(target.pid)
        assert pidfd.wait(process, 5), "its own trap was swallowed"
        pidfd.close(process)


def test_a_process_under_job_control_stays_stopped() -> None:
    with Target() as target:
        os.kill(target.pid, signal.SIGSTOP)
        proc.wait_stopped(target.pid)
        with Stopped(target.pid) as stopped:
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        proc.wait_stopped(target.pid)
        target.say("r 3")
        os.kill(target.pid, signal.SIGCONT)
        assert target.answer() == "3"


def test_a_stop_that_comes_meanwhile_takes_effect_afterwards() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            os.kill(target.pid, signal.SIGSTOP)
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        proc.wait_stopped(target.pid)
        os.kill(target.pid, signal.SIGCONT)
        assert target.ask("r 3") == "3"


def test_a_process_that_has_executed_another_program() -> None:
    with Target() as target:
        with Stopped(target.pid) as stopped:
            stopped.syscall("getpid", SYS_getpid)
        for _ in range(3):
            assert target.ask("x").startswith("ready")
            with Stopped(target.pid) as stopped:
                assert stopped.syscall("getpid", SYS_getpid) == target.pid
        assert target.ask("r 3") == "3"


def test_an_interrupted_wait_leaves_the_target_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = os.waitid

    def interrupted(*_: int) -> object:
        monkeypatch.setattr(os, "waitid", waits)
        raise KeyboardInterrupt

    with Target() as target:
        with Stopped(target.pid) as stopped:
            monkeypatch.setattr(os, "waitid", interrupted)
            with pytest.raises(KeyboardInterrupt):
                # Long enough for the exception to find it on its way.
                stopped.syscall("poll", SYS_poll, 0, 0, 100)
        assert target.ask("r 3") == "3"
        monkeypatch.setattr(os, "waitid", interrupted)
        with pytest.raises(KeyboardInterrupt), Stopped(target.pid):
            pass
        assert target.ask("r 4") == "4"
        assert status(target)["TracerPid"] == "0"


def test_signals_that_people_send_us_wait_until_the_target_is_whole() -> None:
    with Target() as target:
        with Stopped(target.pid):
            assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_seccomp_filter_is_told_and_survived() -> None:
    with Target() as target:
        assert target.ask("f") == "0"
        with Stopped(target.pid) as stopped:
            with pytest.raises(KernelError, match="seccomp") as caught:
                stopped.syscall("getppid", SYS_getppid)
            assert caught.value.errno == errno.EPERM
            assert stopped.syscall("getpid", SYS_getpid) == target.pid
        assert target.ask("r 3") == "3"


def test_a_stub_that_faults_is_told_and_survived() -> None:
    with Target() as target:
        maps = len(proc.maps(target.pid))
        with Stopped(target.pid) as stopped:
            # The stub makes its own table unwritable, and stores the answer there.
            room = stopped.syscall("mmap", ptrace.SYS_mmap, 0, 8192, 3, 0x22, -1, 0)
            stopped.syscall("munmap", ptrace.SYS_munmap, room, 8192)
            protect = np.array([[SYS_mprotect, room + 4096, 4096, 1, 0, 0, 0]], dtype=np.int64)
            with pytest.raises(KernelError, match="SIGSEGV"):
                stopped.batch(protect)
        assert target.ask("r 3") == "3"
        assert len(proc.maps(target.pid)) == maps


def test_a_process_without_privileges_is_handed_the_device() -> None:
    require("userfaultfd-device")
    with Target() as target:
        assert target.ask("u") == "0"
        before = proc.descriptors(target.pid)
        ours, theirs = ptrace.inject_userfaultfd(target.pid)
        with Userfaultfd(ours) as uffd:
            uffd.api(Features.MISSING_SHMEM)
            uffd.register(target.start, target.size, Mode.MISSING)
        assert proc.descriptors(target.pid).keys() - before.keys() == {theirs}
        assert target.ask("r 3") == "3"


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
        assert target.ended() == -signal.SIGKILL


def test_a_process_that_dies_during_a_batch() -> None:
    with Target() as target:
        kill = np.array([[SYS_kill, target.pid, signal.SIGKILL, 0, 0, 0, 0]] * 2, dtype=np.int64)
        with pytest.raises(KernelError) as caught, Stopped(target.pid) as stopped:
            stopped.batch(kill)
        assert caught.value.errno == errno.ESRCH
        assert target.ended() == -signal.SIGKILL


def test_a_thread_that_is_traced_by_another_is_refused() -> None:
    with Target() as target, Stopped(target.pid), pytest.raises(KernelError) as caught, Stopped(target.pid):
        pass
    assert caught.value.errno == errno.EPERM
