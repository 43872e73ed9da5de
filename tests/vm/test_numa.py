"""A real VM's memory and threads by node: shown, and left alone on a host of one node."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outboard.linux.numa import several_nodes
from tests.support.cluster import Vm

pytestmark = pytest.mark.slow


def test_a_vm_is_shown_and_nothing_moves_within_its_node(vm: Vm) -> None:
    if several_nodes():
        pytest.skip("this host has several nodes")
    host = vm.cluster.a

    def told(*arguments: str) -> dict[str, Any]:
        done = host.outboard("numa", *arguments)
        assert done.returncode == 0, done.stderr
        assert "what its kernel needs is not known" not in done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    shown = told("show", vm.name, "--watch", "2", "-o", "json")
    (node,) = shown["nodes"]
    assert node["memory"] + shown["unmapped"] == shown["memory"] == 256 << 20
    assert 1 << 20 < node["touched"] < node["memory"], "it writes to 64 MiB"
    assert [one["vcpu"] for one in shown["vcpus"]] == [0]
    moved = told("move", vm.name, "--to", "0", "--watch", "1", "-o", "ndjson")
    assert (moved["moved"], moved["to_come"]) == (0, 0)
    assert moved["local"] > 0.999
    placed = told("place", vm.name, "--watch", "1", "-o", "json")
    assert not placed["done"]
    assert len(placed["threads"]) >= 2
    refused = host.outboard("numa", "move", vm.name, "--to", "1")
    assert refused.returncode == 3
    assert "no node 1 with memory" in refused.stderr
    vm.verify("a")
