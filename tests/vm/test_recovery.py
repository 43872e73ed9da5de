"""Streams that break off after the commit: both ends keep what they have, and go on when they can."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from guest.build import Image
from tests.support.cluster import Cluster, Host, Vm, wait_for
from tests.support.cutting import cut

pytestmark = pytest.mark.slow

POST_COPY = ("--post-copy", "--max-bandwidth", "10MB")


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


def runs_only_at(vm: Vm, host: str) -> None:
    for name, each in vm.cluster.hosts.items():
        wait_for(lambda each=each, name=name: each.has(vm.name) == (name == host), f"what shall be at {name}")  # type: ignore[misc]
    with vm.record(host).attach(managed=True) as guest:
        assert guest.monitor.execute("query-status")["running"]


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
    for report in reports(vm.cluster.a, vm.name, "b", "--pre-copy", "--max-bandwidth", "30MB", "--no-throttle"):
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
