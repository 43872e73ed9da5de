"""script/bench blocks: migrations over 1 Gbit/s and snapshots with and without references to the blocks of a disk.

The guest is a Debian under systemd (:mod:`guest.disk`) with 512 MiB, its root an overlay over a base image that both
hosts have: once as it has booted to its login prompt, with nothing done since, and once after some minutes of work, in
which it reads half of its files again and again, unpacks an archive, runs Python and Perl, and writes files of its own.
It is then moved to and fro between two hosts in namespaces of one machine, with references and without in turn; the
guest's job proves its memory after each. Indexes are made before, and their time is told. Snapshots are of another
guest that is made the same way: each leaves one more overlay on its disk, and what lies below that is fixed from then.

QEMU drops its images from the page cache when it takes a VM over (the block driver's ``drop-cache``), so that each
migration after the first begins with a cold disk at its source. Both hosts are one machine: what the source has read is
in the page cache when the destination wants it, and what that would wait for a cold disk is not in the figures.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from demo.hosts import ROOT, SHAPES
from guest import disk
from tests.support.cluster import Cluster, Vm, summary_of
from tests.support.link import Link

from .claims import Claim, claim, publish

MIB = 1 << 20
_BOOT_S = 600.0
WORK = """
mkdir -p /var/tmp/work && cd /var/tmp && touch /run/working
setsid sh -c 'while [ -e /run/working ]; do
find /usr -type f -name "*[a-m]" | xargs cat | md5sum
tar -cf work/all.tar /usr/lib/python3 /etc && tar -xf work/all.tar -C work
python3 -c "import json, email, asyncio, xml.dom.minidom"
perl -e "use POSIX; print POSIX::floor(3.7)"
dd if=/dev/urandom of=work/data bs=1M count=24
done' >/dev/null 2>&1 </dev/null &
"""


class Moved(msgspec.Struct, kw_only=True):
    """One migration: bytes on the link's streams, seconds, pages."""

    state: str
    blocks: bool
    bytes: int
    total_s: float
    blackout_ms: float
    pages_by_block: int
    refused: int


class Kept(msgspec.Struct, kw_only=True):
    """One snapshot: bytes of its file, seconds, and the bytes of memory that it refers to."""

    state: str
    blocks: bool
    bytes: int
    total_s: float
    pause_ms: float
    referred: int
    new: int


@contextmanager
def scene(mebibytes: int) -> Iterator[Vm]:
    """Two hosts, a link of 1 Gbit/s, and the guest, booted."""
    image = disk.build(ROOT / ".build/guest")
    with Link() as link, tempfile.TemporaryDirectory(prefix="outboard-blocks-") as place:
        for host in ("a", "b"):
            shape = f"tc qdisc replace dev between root tbf {SHAPES['1gbit']}".split()
            subprocess.run([*link.inside(host), *shape], check=True)
        with Cluster(link=link) as cluster:
            top = disk.overlay(image.base, Path(place) / "top.qcow2")
            tables = f'\n[[disks]]\npath = "{top}"\nformat = "qcow2"\n'
            yield Vm(
                cluster,
                image,
                "desk",
                mebibytes=mebibytes,
                append=f"{disk.COMMAND_LINE} init=/sbin/init",
                tables=tables,
                boot_s=_BOOT_S,
            )


def move(vm: Vm, source: str, state: str, *, blocks: bool) -> Moved:
    """Move the guest from ``source`` to the other host."""
    target = "b" if source == "a" else "a"
    host = vm.cluster.hosts[source]
    done = host.outboard("migrate", vm.name, target, "--blocks", "auto" if blocks else "off", "-o", "ndjson")
    if done.returncode:
        raise click.ClickException(f"{done.stderr}\n{host.log()[-2000:]}")
    told = summary_of(done.stdout)
    return Moved(
        state=state,
        blocks=blocks,
        bytes=told["bytes"],
        total_s=told["total_s"],
        blackout_ms=told["blackout_ms"],
        pages_by_block=told["pages_by_block"],
        refused=told["refused_blocks"],
    )


def keep(vm: Vm, host: str, state: str, *, blocks: bool) -> Kept:
    """Take a snapshot of the guest, and remove it."""
    there = vm.cluster.hosts[host]
    done = there.outboard("snapshot", "create", vm.name, "--blocks", "auto" if blocks else "off", "-o", "json")
    if done.returncode:
        raise click.ClickException(f"{done.stderr}\n{there.log()[-2000:]}")
    told = msgspec.json.decode(done.stdout)
    there.outboard("snapshot", "rm", told["id"])
    return Kept(
        state=state,
        blocks=blocks,
        bytes=told["file"],
        total_s=told["seconds"],
        pause_ms=told["pause_ms"],
        referred=told["referred"],
        new=told["new"],
    )


def shares(vm: Vm, host: str) -> dict[str, Any]:
    """What ``outboard blocks`` says, its indexes made if they lack."""
    done = vm.cluster.hosts[host].outboard("blocks", vm.name, "-o", "json")
    if done.returncode:
        raise click.ClickException(done.stderr)
    found: dict[str, Any] = msgspec.json.decode(done.stdout)
    return found


def judged(
    moved: Sequence[Moved | Kept], what_for: str, state: str, runs: int, bars: tuple[float, float]
) -> list[Claim]:
    """Bytes and time with references, by those without."""
    claims = []
    for (what, unit, by), bar in zip((("bytes", "MB", 1e6), ("total_s", "s", 1.0)), bars, strict=True):
        ours, peer = (
            [getattr(one, what) / by for one in moved if one.state == state and one.blocks == blocks]
            for blocks in (True, False)
        )
        name = f"{state}: {'bytes' if what == 'bytes' else 'time'} of a {what_for} with references"
        claims.append(
            claim(
                name,
                statistics.median(ours),
                bar,
                unit,
                runs,
                peer=statistics.median(peer),
                against="without",
                spread=(min(ours), max(ours)),
            )
        )
    return claims


def tell(found: dict[str, Any], state: str, console: Console) -> None:
    """Where the memory is found."""
    table = Table(title=f"{state}: {found['resident'] / MIB:.0f} MiB resident, looked up in {found['match_s']:.2f} s")
    for heading in ("where", "MiB", "index made in s"):
        table.add_column(heading)
    for one in found["images"]:
        table.add_row("base" if one["depth"] else "overlay", f"{one['matched'] / MIB:.0f}", f"{one['index_s']:.2f}")
    for what in ("zero", "free", "unmatched"):
        table.add_row(what, "-" if found[what] is None else f"{found[what] / MIB:.0f}", "")
    console.print(table)
    kinds = Table(title="of the pages that are this to the guest, MiB")
    for heading in ("kind", "resident", "on a disk", "zeros"):
        kinds.add_column(heading)
    for one in found["classes"]:
        kinds.add_row(one["kind"], *(f"{one[what] / MIB:.1f}" for what in ("resident", "matched", "zero")))
    console.print(kinds)


def work(vm: Vm, host: str, minutes: float) -> None:
    """Have the guest work."""
    vm.write(mebibytes=32, rate=500)
    vm.run(host, WORK)
    time.sleep(minutes * 60)
    vm.run(host, "rm /run/working")


def migrations(memory: int, minutes: float, runs: int, states: Sequence[str], console: Console) -> list[Moved]:
    """Move a guest to and fro, with references and without in turn."""
    moved: list[Moved] = []
    with scene(memory) as vm:
        host = "a"
        for state in states:
            if state == "worked":
                work(vm, host, minutes)
            tell(shares(vm, host), state, console)
            for _ in range(runs):
                for blocks in (True, False):
                    moved.append(move(vm, host, state, blocks=blocks))
                    host = "b" if host == "a" else "a"
                    console.print(moved[-1])
            if state == "worked":
                vm.verify(host)
    return moved


def snapshots(memory: int, minutes: float, runs: int, states: Sequence[str], console: Console) -> list[Kept]:
    """Take snapshots of a guest, with references and without in turn."""
    kept: list[Kept] = []
    with scene(memory) as vm:
        for state in states:
            if state == "worked":
                work(vm, "a", minutes)
            tell(shares(vm, "a"), state, console)
            for _ in range(runs):
                for blocks in (True, False):
                    kept.append(keep(vm, "a", state, blocks=blocks))
                    console.print(kept[-1])
            if state == "worked":
                vm.verify("a")
    return kept


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Of work before the second part; 0 leaves it out.")
@click.option("--memory", default=512, show_default=True, help="MiB of the guest.")
@click.option("--only", type=click.Choice(["migration", "snapshot"]), help="Leave the other out.")
def main(file: Path | None, runs: int, minutes: float, memory: int, only: str | None) -> None:
    """Judge what references to disk blocks save."""
    console = Console()
    bars = {"fresh": (0.5, 0.7)} | ({"worked": (1.0, 1.05)} if minutes else {})
    claims = []
    for what, measure in (("migration", migrations), ("snapshot", snapshots)):
        if only in (None, what):
            done = measure(memory, minutes, runs, list(bars), console)
            for state, both in bars.items():
                claims += judged(done, what, state, runs, both)
    publish(claims, file, console)
    sys.exit(0 if all(one.met for one in claims) else 1)


if __name__ == "__main__":
    main()
