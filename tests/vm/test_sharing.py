"""Two real guests of the same image keep what they have in common once, whoever dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from guest.build import Image
from outboard.agent.domains import Tell, Told, ask_domain
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Look, Release, ask
from outboard.agent.sharer import domain_directory
from outboard.errors import OutboardError
from outboard.linux import proc
from tests.support.cluster import Cluster, Host, Vm, wait_for

pytestmark = pytest.mark.slow

DOMAIN = "twins"


@pytest.fixture
def twins(cluster: Cluster, image: Image) -> Iterator[list[Vm]]:
    made = [Vm(cluster, image, f"twin-{number}", mebibytes=192) for number in (1, 2)]
    for vm in made:
        vm.write(16, 500)
    yield made
    for vm in made:
        cluster.a.outboard("stop", vm.name)


def told(host: Host) -> Told:
    return ask_domain(domain_directory(host.runtime, DOMAIN), Tell())


def saves(host: Host, besides: int = 0) -> bool:
    try:
        now = told(host)
    except OutboardError:
        return False
    return now.saved > 8 << 20 and now.process != besides


def engine_of(vm: Vm) -> int | None:
    try:
        return ask(vm.record("a").memory_directory / CONTROL, Look()).engine
    except OutboardError:
        return None


def test_twins_share_and_part(twins: list[Vm], cluster: Cluster) -> None:
    host = cluster.a
    done = host.outboard("sharing", "scan", DOMAIN, "--pause", "1", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["vms"] == ["twin-1", "twin-2"]
    assert found["shareable"] > 16 << 20
    assert found["scanned"] > found["equal"] > found["contents"] > 0
    for arguments, code, says in (
        (("stop", DOMAIN), 3, "nothing is shared"),
        (("start", "nobody"), 3, "no VM named nobody"),
        (("status", "../etc"), 2, "no name of a sharing domain"),
    ):
        done = host.outboard("sharing", *arguments)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    before = [len(proc.maps(vm.record("a").pid)) for vm in twins]
    done = host.outboard("sharing", "start", DOMAIN, "--every", "1", "--reads", "1")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: saves(host), "something saved")
    for vm in twins:
        vm.verify("a")
    now = told(host)
    assert {one.vm: one.failure for one in now.members} == {"twin-1": None, "twin-2": None}
    # An engine dies, and then the process that scans.
    engine = engine_of(twins[0])
    assert engine is not None
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: engine_of(twins[0]) not in (None, engine), "another engine")
    os.kill(now.process, signal.SIGKILL)
    wait_for(lambda: saves(host, now.process), "another process")
    for vm in twins:
        vm.verify("a")
    done = host.outboard("sharing", "stop", DOMAIN)
    assert done.stdout == "twins shares nothing any more\n", done.stderr
    assert not domain_directory(host.runtime, DOMAIN).exists()
    for vm, mappings in zip(twins, before, strict=True):
        pid = vm.record("a").pid
        ask(vm.record("a").memory_directory / CONTROL, Release())
        assert len(proc.maps(pid)) <= mappings + 8
        assert not [thread for thread in proc.threads(pid) if thread.name == "outboard-hand"]
        vm.verify("a")
