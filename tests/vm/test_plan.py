"""Plans are held against the migrations that follow them, and name what stands in the way of those that cannot."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from outboard.linux import proc
from outboard.vmm.clamp import registrations
from tests.support.cluster import Cluster, Vm, summary_of, wait_for

pytestmark = pytest.mark.slow


def planned(vm: Vm, target: str, *options: str) -> tuple[int, dict[str, Any], str]:
    done = vm.cluster.a.outboard("migrate", vm.name, target, "--plan", "-o", "json", *options)
    plan = json.loads(done.stdout) if done.stdout else {}
    assert not plan or plan["schema"] == "outboard.migration.plan.v1"
    return done.returncode, plan, done.stderr


def traced(vm: Vm) -> bool:
    """Whether somebody's userfaultfd is open inside the VM's QEMU, or holds its memory."""
    pid = vm.record("a").pid
    with vm.record("a").attach(managed=True) as guest:
        inside = any("userfaultfd" in link for link in proc.descriptors(pid).values())
        return inside or any(registrations(pid, guest.regions))


def within(span: dict[str, float | None], value: float) -> bool:
    low, high = span["low"], span["high"]
    assert low is not None
    return low <= value and (high is None or value <= high)


@pytest.mark.parametrize("method", ["enlightened", "pre-copy"])
def test_the_migration_that_follows_keeps_within_the_plan(vm: Vm, method: str) -> None:
    options = (f"--{method}", "--max-downtime", "1s", "--max-bandwidth", "60MB")
    code, plan, errors = planned(vm, "b", *options)
    assert code == 0, errors
    assert plan["blockers"] == []
    assert plan["watched"]["trace"] == "pagemap"
    # Some of 5,000 writes a second hit the same page.
    soon, first = plan["watched"]["growth"][0]
    assert 500 < first / soon < 50000
    assert not traced(vm)
    assert not vm.cluster.b.has(vm.name)
    expected = next(one for one in plan["expected"] if one["method"] == method)
    assert expected["ends"]
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "-o", "ndjson", *options)
    assert done.returncode == 0, done.stderr
    summary = summary_of(done.stdout)
    shown = {key: (expected[key], value) for key, value in figures(summary).items()}
    print(method, shown)
    assert within(expected["bytes"], summary["bytes"]), shown
    # Times are this machine's, which is shared; a plan allows for that, and so does this.
    for key, value in figures(summary).items():
        assert within({"low": expected[key]["low"] / 4, "high": 4 * expected[key]["high"]}, value), (key, shown)
    vm.verify("b")


def figures(summary: dict[str, Any]) -> dict[str, float]:
    return {
        "bytes": summary["bytes"],
        "total_s": summary["total_s"],
        "resume_s": summary["time_to_resume_s"],
        "blackout_ms": summary["blackout_ms"],
    }


def test_a_guest_that_writes_too_fast_is_foreseen_not_to_end(vm: Vm) -> None:
    options = ("--max-bandwidth", "8MB", "--no-throttle")
    code, plan, errors = planned(vm, "b", *options)
    assert code == 0, errors
    by_method = {one["method"]: one for one in plan["expected"]}
    assert by_method["pre-copy"]["ends"] is False
    assert by_method["pre-copy"]["total_s"]["high"] is None
    assert by_method["enlightened"]["ends"]
    assert plan["recommended"] != "pre-copy"
    said = vm.cluster.a.outboard("migrate", vm.name, "b", "--plan", *options)
    assert said.returncode == 0
    assert "nothing was moved" in said.stdout
    assert "does not end" in said.stdout
    vm.verify("a")


def test_what_stands_in_the_way_is_named(vm: Vm, cluster: Cluster) -> None:
    code, plan, errors = planned(vm, "silent")
    assert code == 4
    assert [one["reason"] for one in plan["blockers"]] == ["unreachable"]
    assert plan["blockers"][0]["at"] == "silent"
    assert plan["recommended"] is not None
    assert "cannot be moved to silent" in errors
    # A VM of that name runs there.
    spec = cluster.root / f"{vm.name}-twin.toml"
    spec.write_text(f'name = "{vm.name}"\nmemory = "16MiB"\naccel = "tcg"\nguest_agent = false\n')
    assert cluster.b.outboard("run", str(spec)).returncode == 0
    try:
        code, plan, errors = planned(vm, "b")
        assert code == 4
        assert [(one["at"], one["reason"]) for one in plan["blockers"]] == [("b", "name-taken")]
        assert "end it with outboard stop" in errors
    finally:
        cluster.b.outboard("stop", vm.name)
    assert planned(vm, "nowhere")[0] == 3
    assert vm.cluster.a.outboard("evict", vm.name, "--idle", "0").returncode == 0
    code, plan, _ = planned(vm, "b")
    assert (code, [one["reason"] for one in plan["blockers"]]) == (4, ["managed"])
    assert plan["watched"] is None
    assert vm.cluster.a.outboard("release", vm.name).returncode == 0
    vm.verify("a")


def test_a_plan_whose_engine_is_killed_leaves_nothing(vm: Vm) -> None:
    process = vm.cluster.a.popen("migrate", vm.name, "b", "--plan")
    engine = vm.cluster.a.engine()
    # Held, so that it is still at work when the next command comes, however slow that is.
    os.kill(engine, signal.SIGSTOP)
    done = vm.cluster.a.outboard("migrate", vm.name, "b")
    os.kill(engine, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "nothing was moved" in errors
    assert done.returncode == 4
    assert "being watched for a plan" in done.stderr
    wait_for(lambda: not traced(vm), "the trace's end")
    done = vm.cluster.a.outboard("migrate", vm.name, "b")
    assert done.returncode == 0, done.stderr
    vm.verify("b")
