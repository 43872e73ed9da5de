"""Streams that break off after the commit: both ends keep what they have, and go on when they can."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from guest.build import Image
from tests.support.cluster import Cluster, Host, Vm, wait_for
from tests.support.cutting import cut

pytestmark = pytest.mark.slow

POST_COPY = ("--post-copy", "--max-bandwidth", "10MB")
PRE_COPY = ("--pre-copy", "--max-bandwidth", "30MB", "--no-throttle")


def reports(host: Host, *arguments: str) -> Iterator[dict[str, object]]:
    """The reports of a migration, as they come."""
    process = host.popen("migrate", *arguments, "-o", "ndjson")
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            yield json.loads(line)
    finally:
        # Also of a test that fails.
        process.kill()
        process.communicate()


def disturbed(vm: Vm, state: str, disturb: Callable[[], object], *options: str) -> dict[str, object]:
    """Migrate, and disturb that once, as soon as it is in ``state``; the last report."""
    done = False
    last: dict[str, object] = {}
    for report in reports(vm.cluster.a, vm.name, "b", *options):
        last = report
        if report["state"] == state and not done:
            done = True
            disturb()
    assert done, last
    return last


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def runs_only_at(vm: Vm, host: str) -> None:
    for name, each in vm.cluster.hosts.items():
        wait_for(lambda each=each, name=name: each.has(vm.name) == (name == host), f"what shall be at {name}")  # type: ignore[misc]

    def running() -> bool:
        with vm.record(host).attach(managed=True) as guest:
            return bool(guest.monitor.execute("query-status")["running"])

    wait_for(running, "the guest's going on")


@pytest.mark.parametrize("end", ["a", "b"])
def test_a_postcopy_repairs_itself_twice(vm: Vm, end: str) -> None:
    cuts = 0
    states: list[object] = []
    last: dict[str, object] = {}
    for report in reports(vm.cluster.a, vm.name, "b", *POST_COPY):
        last = report
        if not states or states[-1] != report["state"]:
            states.append(report["state"])
            if report["state"] == "postcopy" and cuts < 2:
                cuts += 1
                assert cut(vm.cluster.hosts[end].engine()) >= 1, cuts
    assert states.count("recovering") == 2, states
    assert last["state"] == "completed", last
    assert last["safe_at"] == "destination"
    runs_only_at(vm, "b")
    vm.verify("b")
    assert not list((vm.cluster.b.registry.get(vm.name).directory).glob("reopened*"))


def test_it_waits_for_as_long_as_nobody_can_repair_it(image: Image) -> None:
    """The destination's agent is down when the streams break off: the VM waits for what is missing, and is not lost."""
    with Cluster(31) as cluster:
        vm = Vm(cluster, image, "web")
        vm.write()
        broken = False
        last: dict[str, object] = {}
        for report in reports(cluster.a, vm.name, "b", *POST_COPY):
            last = report
            if report["state"] == "postcopy" and not broken:
                broken = True
                engine = cluster.b.engine()
                cluster.b.kill_agent()
                cut(engine)
            elif report["state"] == "recovering" and not (cluster.b.runtime / "agent.sock").exists():
                assert report["verdict"]
                cluster.b.start_agent()
        assert last["state"] == "completed", last
        runs_only_at(vm, "b")
        vm.verify("b")


def test_a_commit_that_never_arrived_leaves_the_vm_at_the_source(vm: Vm) -> None:
    """The destination's agent has sworn it off before the engine could commit."""
    incoming = vm.cluster.b.directory / "state" / "incoming"
    last: dict[str, object] = {}
    for report in reports(vm.cluster.a, vm.name, "b", *PRE_COPY):
        last = report
        if report["state"] == "copying":
            for announced in incoming.glob("*.json"):
                announced.with_suffix(".verdict").write_text("refused")
    assert last["state"] == "failed", last
    assert last["safe_at"] == "source"
    assert "sworn it off" in str(last["error"])
    runs_only_at(vm, "a")
    vm.verify("a")
    done = vm.cluster.a.outboard("migrate", vm.name, "b")
    assert done.returncode == 0, done.stderr
    vm.verify("b")


@pytest.mark.parametrize("end", ["a", "b"])
def test_a_killed_engine_has_a_successor_after_the_commit(vm: Vm, end: str) -> None:
    kills = 0
    last: dict[str, object] = {}
    for report in reports(vm.cluster.a, vm.name, "b", *POST_COPY):
        last = report
        if report["state"] == "postcopy" and kills < 2:
            kills += 1
            kill(vm.cluster.hosts[end].engine())
    assert kills == 2
    assert last["state"] == "completed", last
    runs_only_at(vm, "b")
    vm.verify("b")
    directory = vm.cluster.b.registry.get(vm.name).directory
    wait_for(lambda: not (directory / "arriving").exists(), "the end of the engine")
    assert vm.cluster.b.outboard("migrate", vm.name, "a").returncode == 0
    vm.verify("a")


def test_a_killed_engine_leaves_the_vm_running_before_the_commit(vm: Vm) -> None:
    """Killed at the destination, its QEMU ends; killed at the source, the guest goes on."""
    for end in (vm.cluster.b, vm.cluster.a):
        disturbed(vm, "copying", lambda end=end: kill(end.engine()), *PRE_COPY)  # type: ignore[misc]
        runs_only_at(vm, "a")
        vm.verify("a")


def test_an_engine_killed_in_the_pause_leaves_no_paused_vm(vm: Vm) -> None:
    """With --verify the guest stands still until every page has arrived."""
    disturbed(vm, "switching", lambda: kill(vm.cluster.a.engine()), "--verify", "--max-bandwidth", "20MB")
    runs_only_at(vm, "a")
    vm.verify("a")


def test_the_sources_qemu_is_not_needed_after_the_commit(vm: Vm) -> None:
    """What is still here lies in its memory's file, which the engine holds."""
    last = disturbed(vm, "postcopy", lambda: kill(vm.record("a").pid), *POST_COPY)
    assert last["state"] == "completed", last
    runs_only_at(vm, "b")
    vm.verify("b")


def test_a_destination_that_is_lost_after_the_commit_is_told_of(vm: Vm) -> None:
    """Its QEMU held the only copy that may run: the source keeps what it has, and runs nothing by itself."""
    last = disturbed(vm, "postcopy", lambda: kill(vm.record("b").pid), *POST_COPY)
    assert last["state"] == "paused", last
    assert last["exit_code"] == 6
    assert "has ended" in str(last["error"])
    with vm.record("a").attach() as guest:
        assert not guest.monitor.execute("query-status")["running"]
    refused = vm.cluster.a.outboard("migrate", vm.name, "b")
    assert refused.returncode == 4
    assert "was given to b" in refused.stderr
    assert vm.cluster.a.outboard("stop", vm.name).returncode == 0


def test_both_agents_and_an_engine_die_after_the_commit(image: Image) -> None:
    with Cluster(33) as cluster:
        vm = Vm(cluster, image, "web")
        vm.write()

        def kill_all() -> None:
            engines = [host.engine() for host in cluster.hosts.values()]
            for host in cluster.hosts.values():
                host.kill_agent()
            for engine in engines:
                kill(engine)
            for host in cluster.hosts.values():
                host.start_agent()

        disturbed(vm, "postcopy", kill_all, *POST_COPY)

        def completed() -> bool:
            lines = cluster.a.outboard("history", vm.name, "-o", "ndjson").stdout.splitlines()
            return any(json.loads(line)["state"] == "completed" for line in lines)

        wait_for(completed, "the end of the migration")
        runs_only_at(vm, "b")
        vm.verify("b")
