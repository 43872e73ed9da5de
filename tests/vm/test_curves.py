"""Curves, working sets and heat of a real VM, which goes on undamaged."""

from __future__ import annotations

import json

import pytest

from tests.support.cluster import Vm

pytestmark = pytest.mark.slow


def test_the_curve_falls_where_the_working_set_ends(vm: Vm) -> None:
    """The guest writes 5,000 random pages/s of 64 MiB."""
    done = vm.cluster.a.outboard("mrc", vm.name, "--duration", "15", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    at = {point["bytes"]: point["misses_per_s"] for point in found["points"]}
    within = [rate for size, rate in at.items() if 16 << 20 < size < 32 << 20]
    beyond = [rate for size, rate in at.items() if size > 96 << 20]
    assert sum(within) / len(within) > 1000
    assert all(rate < 500 for rate in beyond)
    vm.verify("a")


def test_the_working_set_and_the_heat_are_told(vm: Vm) -> None:
    done = vm.cluster.a.outboard("wss", vm.name, "--duration", "12", "-o", "json")
    assert done.returncode == 0, done.stderr
    sizes = {one["window"]: one["bytes"] for one in json.loads(done.stdout)["working_sets"]}
    # 5,000 pages/s are 20 MB within a second where none comes twice; 64 MiB fill up within ten.
    assert 10e6 < sizes[1.0] < 40e6
    assert 40e6 < sizes[5.0] < 100e6
    done = vm.cluster.a.outboard("heat", vm.name, "--duration", "3", "-o", "ndjson")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert 0 < last["touched"] < 0.5
    vm.verify("a")


def test_a_managed_vm_is_traced_too(vm: Vm) -> None:
    host = vm.cluster.a
    assert host.outboard("evict", vm.name, "--idle", "0.5").returncode == 0
    done = host.outboard("wss", vm.name, "--duration", "6", "-o", "json")
    assert done.returncode == 0, done.stderr
    sizes = {one["window"]: one["bytes"] for one in json.loads(done.stdout)["working_sets"]}
    assert 10e6 < sizes[1.0] < 40e6
    done = host.outboard("heat", vm.name, "--duration", "3", "-o", "ndjson")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout.splitlines()[-1])["touched"] < 0.5
    # It is managed as before.
    assert host.outboard("evict", vm.name, "--idle", "0.5", "--to", "file").returncode == 0
    vm.verify("a")
    assert host.outboard("release", vm.name).returncode == 0
    vm.verify("a")
