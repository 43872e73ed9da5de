"""A real guest on a disk: what its memory shares with it is found, goes as references, and is dropped."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest import disk
from guest.disk import DiskImage
from tests.support.cluster import Cluster, Host, Vm, summary_of
from tests.support.machine import disk_image
from tests.support.requirements import require

pytestmark = pytest.mark.slow
MIB = 1 << 20
READ = "cat /usr/bin/perl /usr/bin/python3.11 /usr/lib/x86_64-linux-gnu/libcrypto.so.3 | md5sum"


@pytest.fixture(scope="module")
def image() -> DiskImage:
    """The test guest on a disk."""
    require("qemu", "root")
    return disk_image()


@pytest.fixture
def vm(cluster: Cluster, image: DiskImage, tmp_path: Path) -> Iterator[Vm]:
    """A VM on host a that has read much of its disk, and writes to some of its memory."""
    top = disk.overlay(image.base, tmp_path / "top.qcow2")
    made = Vm(
        cluster,
        image,
        "on-disk",
        append=f"{disk.COMMAND_LINE} init=/init",
        tables=f'\n[[disks]]\npath = "{top}"\nformat = "qcow2"\n',
    )
    yield made
    for host in cluster.hosts.values():
        if host.has(made.name):
            host.outboard("stop", made.name)


def told(host: Host, *arguments: str) -> dict[str, Any]:
    done = host.outboard(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr + host.log()[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_the_disk_holds_is_found_sent_as_references_and_dropped(vm: Vm, image: DiskImage) -> None:
    read = vm.run("a", READ)
    vm.write(mebibytes=16)
    shares = told(vm.cluster.a, "blocks", vm.name)
    top, base = shares["images"]
    assert (top["fixed"], base["fixed"], base["path"]) == (False, True, str(image.base))
    assert base["matched"] > 12 * MIB
    assert shares["resident"] == shares["matched"] + shares["zero"] + shares["free"] + shares["unmatched"]
    assert not shares["left"]
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "--verify", "-o", "ndjson")
    assert done.returncode == 0, done.stderr + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    summary = summary_of(done.stdout)
    assert summary["pages_by_block"] > 2000, summary
    assert (summary["refused_blocks"], summary["verified"]) == (0, True)
    assert str(image.base) in summary["blocks"]
    vm.verify("b")
    away = told(vm.cluster.b, "evict", vm.name, "--idle", "1")
    assert away["disk"] > 12 * MIB
    # What it reads now comes from the disk through our hands.
    assert vm.run("b", READ) == read
    vm.verify("b")
    known = told(vm.cluster.b, "blocks", vm.name, "--learn")
    assert known["moved"] > 12 * MIB
    refused = vm.cluster.b.outboard("recover", vm.name, "--page", "99999999")
    assert (refused.returncode, "has pages 0 to" in refused.stderr) == (4, True)
    assert told(vm.cluster.b, "release", vm.name)["disk"] == 0
    vm.verify("b")
    done = vm.cluster.b.outboard("migrate", vm.name, "a", "--blocks", "off", "-o", "ndjson")
    assert done.returncode == 0, done.stderr
    assert summary_of(done.stdout)["pages_by_block"] == 0
    vm.verify("a")


def test_a_snapshot_refers_to_the_disk_and_is_restored_from_there(vm: Vm) -> None:
    host = vm.cluster.a
    read = vm.run("a", READ)
    vm.write(mebibytes=16)
    # The index is made here.
    assert told(host, "blocks", vm.name)["fixed"] > 12 * MIB
    assert told(host, "evict", vm.name, "--idle", "1")["disk"] > 12 * MIB
    # What was left to the disk is written out all the same where nothing is to be referred to.
    whole = told(host, "snapshot", "create", vm.name, "--blocks", "off")
    assert whole["referred"] == 0
    # While the image is taken it reads what was left to the disk, and writes.
    vm.run("a", "(while cat /usr/bin/perl; do sleep 0.1; done) >/dev/null 2>&1 & echo $! >/tmp/reader")
    taken = told(host, "snapshot", "create", vm.name)
    vm.run("a", "kill $(cat /tmp/reader)")
    assert taken["referred"] > 12 * MIB
    assert taken["file"] < whole["file"] - 2 * MIB
    vm.verify("a")
    assert told(host, "snapshot", "verify", taken["id"])["files"] == 1
    clone = copy.copy(vm)
    clone.name = f"{vm.name}-again"
    try:
        assert told(host, "snapshot", "restore", taken["id"], "--name", clone.name)["running"]
        clone.run("a", "kill $(cat /tmp/reader)")
        clone.verify("a")
        assert clone.run("a", READ) == read
    finally:
        host.outboard("stop", clone.name)
    # The VM itself goes on, with its pages where they were.
    assert told(host, "release", vm.name)["disk"] == 0
    vm.verify("a")
