"""A real guest whose idle memory goes to a reserved swap file: blocks are counted, engines killed, pages verified."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from guest.build import Image
from tests.support.cluster import Cluster, Host, Vm, wait_for
from tests.support.requirements import require

pytestmark = pytest.mark.slow

MIB = 1 << 20


def blocks(directory: Path) -> int:
    found = [directory / "reservation", directory / "ballast", *(directory / "vms").iterdir()]
    return sum(path.stat().st_blocks for path in found)


def told(host: Host, *arguments: str) -> dict[str, Any]:
    done = host.outboard(*arguments, "-o", "json")
    assert done.returncode == 0, done.stderr + host.log()[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_guest_is_reclaimed_into_what_was_reserved(image: Image) -> None:
    require("root")
    cluster = Cluster(41)
    with (cluster.a.directory / "etc" / "agent.toml").open("a") as file:
        file.write('\n[swap]\nreservation = "256MiB"\n\n[pools.prod]\nlimit = "220MiB"\nshares = 2000\n')
    host = cluster.a
    swap = host.directory / "state" / "swap"
    with cluster:
        before = blocks(swap)
        vm = Vm(cluster, image, "web", more='pool = "prod"\nmemory_reservation = "40MiB"')
        vm.write(mebibytes=32, rate=2000)
        # Another one could outgrow what is left.
        refused = host.outboard("run", str(cluster.root / "web.toml"))
        assert refused.returncode == 4
        other = cluster.root / "db.toml"
        other.write_text(other.with_name("web.toml").read_text().replace('"web"', '"db"'))
        refused = host.outboard("run", str(other))
        assert refused.returncode == 4
        assert "pool prod (limit) is 220 MiB, of which 216 MiB are spoken for and 4 MiB left" in refused.stderr
        taken = told(host, "reclaim", "web", "--target", "70M", "--most-faults", "100000")["used"]
        assert taken > 80 * MIB
        wait_for(lambda: told(host, "reclaim", "web")["used"] <= 75 * MIB, "the target")
        engine = told(host, "residency", "web")["engine"]
        os.kill(engine, signal.SIGKILL)
        vm.verify("a")
        status = told(host, "swap", "status")
        assert status["blocks"] == status["blocks_reserved"] == before == blocks(swap)
        (web,) = status["vms"]
        assert (web["vm"], web["pool"], web["promised"]) == ("web", "prod", 216 * MIB)
        assert web["used"] > 10 * MIB
        # A successor aims at the same.
        looked = told(host, "reclaim", "web")
        assert (looked["reclaim"]["target"], looked["engine"] != engine) == (70 * MIB, True)
        assert told(host, "reclaim", "web", "--stop")["reclaim"] is None
        assert told(host, "release", "web")["file"] == 0
        vm.verify("a")
        assert told(host, "swap", "status")["vms"][0]["used"] == 0
        assert not list((swap / "vms").iterdir())
        assert blocks(swap) == before
        for arguments, code, says in (
            (("reclaim", "web"), 3, "not managed"),
            (("reclaim", "web", "--target", "lots"), 2, "is no size"),
            (("reclaim", "web", "--target", "64MiB", "--stop"), 2, "cannot both be meant"),
        ):
            done = host.outboard(*arguments)
            assert (done.returncode, says in done.stderr) == (code, True), done.stderr
        missing = cluster.b.outboard("swap", "status")
        assert (missing.returncode, "no swap is reserved on this host" in missing.stderr) == (3, True)
        assert host.outboard("swap", "status").returncode == 0
