"""Guests move while their disks and network devices work: no ring is missing at the destination when they resume."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.build import Image
from outboard.vmm.guest_agent import GuestAgent
from outboard.vmm.virtqueues import DevicePages, find
from tests.support.cluster import Cluster, Vm, summary_of

pytestmark = pytest.mark.slow

NETWORK = """extra_args = ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=%s"]"""
LOAD = "while :; do dd if=/dev/vda of=/dev/null bs=256k iflag=direct; done"


@pytest.fixture(params=["", ",packed=on"], ids=["split", "packed"])
def busy(cluster: Cluster, image: Image, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A VM with a disk that it reads without end, and a network."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(secrets.token_bytes(16 << 20))
    tables = f'\n[[disks]]\npath = "{disk}"\n'
    made = Vm(cluster, image, f"vm-{secrets.token_hex(3)}", more=NETWORK % request.param, tables=tables)
    made.write()
    run(made, "a", f"setsid sh -c '{LOAD}' >/dev/null 2>&1 </dev/null & ip link set eth0 up")
    yield made
    for host in cluster.hosts.values():
        if host.has(made.name):
            host.outboard("stop", made.name)


def run(vm: Vm, host: str, line: str) -> bytes:
    path = vm.record(host).agent_socket
    assert path is not None
    with GuestAgent(path, timeout=60) as agent:
        status, said = agent.run("/bin/sh", "-c", line)
    assert status == 0, said
    return said


def sectors_read(vm: Vm, host: str) -> int:
    return int(run(vm, host, "cat /sys/block/vda/stat").split()[2])


def test_the_rings_are_where_qemu_says(busy: Vm) -> None:
    with busy.record("a").attach() as guest:
        found = find(guest.monitor)
        assert found.words.endswith(" queues of 3 devices"), found.words
        told = DevicePages(guest, found)
        # The network's receive queue is full of buffers, whatever else is going on.
        assert len(told.in_flight()) >= 16
        assert len(told.rings()) >= len(found.queues)


@pytest.mark.parametrize("method", ["enlightened", "post-copy"])
def test_devices_at_work_find_their_queues(busy: Vm, method: str) -> None:
    before = sectors_read(busy, "a")
    done = busy.cluster.a.outboard("migrate", busy.name, "b", f"--{method}", "-o", "ndjson", "--max-downtime", "1s")
    assert done.returncode == 0, done.stderr + busy.cluster.a.log()[-2000:]
    summary = summary_of(done.stdout)
    assert summary["queues"].endswith("queues of 3 devices")
    assert summary["queue_pages"] > 16
    assert summary["queue_faults"] == 0, summary
    busy.verify("b")
    there = sectors_read(busy, "b")
    assert there > before
    while sectors_read(busy, "b") == there:
        pass
