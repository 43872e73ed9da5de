"""Who is held back is, nobody else is, and all are let go, whoever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from outboard.errors import KernelError
from outboard.linux import cgroup, proc
from outboard.vmm.brake import Brake, release_left_over
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def target() -> Iterator[Target]:
    require("cgroup-cpu")
    with Target(threads=2) as running:
        running.ask("g")
        yield running


@pytest.fixture
def guest(target: Target) -> Iterator[Guest]:
    with guest_of(target) as found:
        yield found


def writers(target: Target) -> list[int]:
    return [thread.tid for thread in proc.threads(target.pid) if thread.tid != target.pid]


def ran(target: Target, tid: int, seconds: float) -> float:
    before = proc.processor_seconds(target.pid, tid)
    time.sleep(seconds)
    return proc.processor_seconds(target.pid, tid) - before


def test_one_is_held_and_the_other_is_not(target: Target, guest: Guest) -> None:
    held, free = writers(target)
    home = cgroup.names(target.pid)
    with Brake(guest, {held: 1.0}) as brake:
        brake.hold(0.05)
        before = proc.processor_seconds(target.pid, free)
        # Of a second, a twentieth, and what was left of the time slice that it had; ticks are a hundredth.
        assert ran(target, held, 1.0) < 0.15
        assert proc.processor_seconds(target.pid, free) > before
        brake.hold(1)
        brake.hold(0.5)
    brake.release()
    assert cgroup.names(target.pid) == home
    assert target.ask("s").startswith("bad 0 of")


def test_what_a_dead_holder_held_is_let_go(target: Target, guest: Guest) -> None:
    home = cgroup.names(target.pid)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Brake(guest, dict.fromkeys(writers(target), 1.0)).hold(0.05)
        os.write(writer, b"held")
        signal.pause()
    assert os.read(reader, 4) == b"held"
    assert len(cgroup.names(target.pid) - home) == 2
    # Its holder lives.
    assert release_left_over(target.pid) == 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert release_left_over(target.pid) == 2
    assert cgroup.names(target.pid) == home
    assert release_left_over(target.pid) == 0
    for fd in (reader, writer):
        os.close(fd)


def test_a_thread_that_is_none_changes_nothing(target: Target, guest: Guest) -> None:
    home = cgroup.names(target.pid)
    with pytest.raises(KernelError):
        Brake(guest, {writers(target)[0]: 1.0, 4_194_303: 1.0})
    assert cgroup.names(target.pid) == home
