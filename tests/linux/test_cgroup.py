"""How much processor time threads may have."""

from __future__ import annotations

import errno
import select
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import cgroup, proc
from outboard.linux.cgroup import CpuGroup
from tests.support.requirements import require
from tests.support.target import Target


def cpu_group(target: Target, tid: int) -> str:
    lines = Path(f"/proc/{target.pid}/task/{tid}/cgroup").read_text().splitlines()
    wanted = "cpu" if cgroup.cpu_version() == 1 else ""
    return next(path for _, kinds, path in (line.split(":", 2) for line in lines) if wanted in kinds.split(","))


WEIGHT_OF_ONE = 1024 if cgroup.cpu_version() == 1 else 100


def weight(group: CpuGroup) -> int:
    return int((group.path / ("cpu.shares" if cgroup.cpu_version() == 1 else "cpu.weight")).read_text())


def writers(target: Target) -> list[int]:
    target.ask("g")
    return [thread.tid for thread in proc.threads(target.pid) if thread.tid != target.pid]


def test_only_the_threads_put_in_are_limited_and_all_go_back() -> None:
    require("cgroup-cpu")
    with Target(threads=3) as target:
        first, second, third = writers(target)
        before = {tid: cpu_group(target, tid) for tid in (target.pid, first, second, third)}
        with CpuGroup("outboard-test", target.pid) as group:
            group.add(first)
            group.add(second)
            assert group.threads() == [first, second]
            assert cpu_group(target, first).endswith("/outboard-test")
            assert cpu_group(target, third) == before[third]
            assert cpu_group(target, target.pid) == before[target.pid]
            assert weight(group) == 2 * WEIGHT_OF_ONE
            group.limit(0.05)
            while group.throttled() == 0:
                select.select([], [], [], 0.02)
            group.limit(None)
        assert {tid: cpu_group(target, tid) for tid in before} == before
        assert target.ask("s").startswith("bad 0 of")


def test_a_successor_takes_over_what_was_left_behind() -> None:
    require("cgroup-cpu")
    with Target(threads=1) as target:
        (tid,) = writers(target)
        before = cpu_group(target, tid)
        CpuGroup("outboard-test", target.pid).add(tid)
        with CpuGroup("outboard-test", target.pid) as successor:
            assert successor.threads() == [tid]
        assert cpu_group(target, tid) == before


def test_closing_after_the_process_has_ended() -> None:
    require("cgroup-cpu")
    with Target(threads=1) as target:
        (tid,) = writers(target)
        group = CpuGroup("outboard-test", target.pid)
        group.add(tid)
    group.close()
    group.close()


def test_a_limit_below_what_the_kernel_can_is_refused() -> None:
    require("cgroup-cpu")
    with Target() as target, CpuGroup("outboard-test", target.pid) as group:
        group.limit(0.01)
        with pytest.raises(KernelError) as caught:
            group.limit(0.001)
        assert caught.value.errno == errno.EINVAL


def test_a_thread_that_is_not_there() -> None:
    require("cgroup-cpu")
    with Target() as target, CpuGroup("outboard-test", target.pid) as group, pytest.raises(KernelError):
        group.add(2**22 + 1)


def test_a_machine_without_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_hierarchy", lambda: None)
    assert cgroup.cpu_version() is None
    with pytest.raises(KernelError, match="cpu controller"):
        CpuGroup("outboard-test", 1)
