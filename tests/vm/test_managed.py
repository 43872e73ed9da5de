"""A real guest whose memory is managed: evicted, brought back, and never lost, whoever dies."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from typing import Any

import pytest

from guest.build import Image
from outboard.linux import pidfd, proc
from tests.support.cluster import Cluster, Host, Vm, wait_for

pytestmark = pytest.mark.slow


def memory(host: Host, *arguments: str) -> dict[str, Any]:
    done = host.outboard(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr + host.log()[-2000:]
    looked: dict[str, Any] = json.loads(done.stdout)
    assert looked["schema"] == "outboard.residency.v1"
    return looked


def ended(engine: int) -> bool:
    return not pidfd.alive(engine)


def test_idle_memory_goes_and_comes_back(vm: Vm) -> None:
    host = vm.cluster.a
    away = memory(host, "evict", vm.name, "--idle", "1", "--to", "file")
    assert away["moved"] > 50 << 20
    assert away["resident"] + away["zero"] + away["pool"] + away["file"] == away["memory"]
    assert away["file"] > 20 << 20
    vm.verify("a")
    assert memory(host, "residency", vm.name)["faults"] > 0
    assert memory(host, "fetch", vm.name)["file"] == 0
    refused = host.outboard("migrate", vm.name, "b")
    assert refused.returncode == 4
    assert f"outboard release {vm.name}" in refused.stderr
    assert memory(host, "release", vm.name)["file"] == 0
    assert not [link for link in proc.descriptors(vm.record("a").pid).values() if "userfaultfd" in link]
    assert not vm.record("a").memory_directory.exists()
    vm.verify("a")
    for arguments, code, says in (
        (("evict", "nobody"), 3, "no VM named nobody"),
        (("residency", vm.name), 3, "not managed"),
        (("release", vm.name), 3, "not managed"),
        (("fetch", vm.name), 3, "not managed"),
        (("engine", "upgrade", vm.name), 3, "not managed"),
        (("evict", vm.name, "--most", "lots"), 2, "is no size"),
        (("evict", vm.name, "--idle", "-1"), 2, "--idle"),
    ):
        done = host.outboard(*arguments)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert host.outboard("migrate", vm.name, "b").returncode == 0
    vm.verify("b")


def test_a_killed_engine_is_replaced_and_a_new_one_takes_over(vm: Vm) -> None:
    host = vm.cluster.a
    engine = memory(host, "evict", vm.name, "--idle", "0.5")["engine"]
    for to in ("pool", "file", "pool"):
        os.kill(engine, signal.SIGKILL)

        def other(dead: int = engine) -> bool:
            done = host.outboard("residency", vm.name, "-o", "json")
            return done.returncode == 0 and json.loads(done.stdout)["engine"] != dead

        wait_for(other, "another engine")
        engine = memory(host, "evict", vm.name, "--idle", "0.2", "--to", to)["engine"]
    vm.verify("a")
    for _ in range(2):
        done = host.outboard("engine", "upgrade", vm.name)
        assert done.returncode == 0, done.stderr + host.log()[-2000:]
        now = memory(host, "residency", vm.name)["engine"]
        assert now != engine
        wait_for(partial(ended, engine), "the old engine's end")
        engine = now
    vm.verify("a")
    assert memory(host, "release", vm.name)["pool"] == 0
    vm.verify("a")


def test_a_killed_agent_is_not_missed_and_its_successor_goes_on(image: Image) -> None:
    with Cluster(21) as cluster:
        vm = Vm(cluster, image, "web")
        vm.write()
        host = cluster.a
        engine = memory(host, "evict", vm.name, "--idle", "0.5")["engine"]
        host.kill_agent()
        vm.verify("a")
        assert memory(host, "residency", vm.name)["engine"] == engine
        # Both are dead now, and an agent that starts finds the VM.
        os.kill(engine, signal.SIGKILL)
        wait_for(partial(ended, engine), "the engine's end")
        host.start_agent()
        wait_for(lambda: host.outboard("residency", vm.name).returncode == 0, "another engine")
        vm.verify("a")
        engine = memory(host, "residency", vm.name)["engine"]
        assert host.outboard("stop", vm.name).returncode == 0
        wait_for(partial(ended, engine), "the engine's end")
        wait_for(lambda: "memory is managed no more" in host.log(), "the agent's notice")
        assert not list((host.directory / "state" / "swap").iterdir())
        assert "has no engine" not in host.log()
