"""outboard snapshot: VMs as they were at an instant, and VMs restored from that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from outboard.agent.config import runtime_dir, snapshot_dir
from outboard.agent.orders import Snapped, Snapshot, ask_snapshot
from outboard.agent.restoring import source_of
from outboard.cli.api import call
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.snapshot import catalog
from outboard.stores import snapshot_format
from outboard.stores.snapshot import SUFFIX, open_chain
from outboard.vmm.registry import Registry


class Snapshots(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.snapshots.v1"):
    """The snapshots of this host."""

    snapshots: list[catalog.Listed]


class Began(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.snapshot.restored.v1"):
    """A VM that was restored."""

    vm: str
    snapshot: str
    running: bool
    seconds: float


class Removed(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.snapshot.removed.v1"):
    """A snapshot that is gone."""

    id: str


@click.group()
def snapshot() -> None:
    """Snapshots of running VMs: their memory and devices at one instant, and their disks held still there."""


def _tell(snapped: Snapped, output: str) -> None:
    if output == "json":
        print_json(snapped)
        return
    click.echo(snapped.id)
    click.echo(
        f"{size_text(snapped.memory)}: {size_text(snapped.zero)} zeros, {size_text(snapped.referred)} elsewhere, "
        f"{size_text(snapped.new)} new; {size_text(snapped.file)} on disk in {snapped.seconds:.1f} s; "
        f"{snapped.vm} stood still for {snapped.pause_ms:.0f} ms",
        err=True,
    )


@snapshot.command(epilog="Example: outboard snapshot create web --incremental")
@click.argument("vm")
@click.option("--incremental", is_flag=True, help="Keep only what differs from the VM's last snapshot.")
@click.option(
    "--blocks",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Refer to what the VM's disks hold; off: write everything, so that it depends on no disk's content.",
)
@output_option("table", "json")
def create(vm: str, incremental: bool, blocks: str, output: str) -> None:
    """Take a snapshot of a running VM, which goes on meanwhile; prints its name.

    Disks that the VM writes to are held still: what it writes from then on goes to an overlay beside each.
    """
    managed = Registry(runtime_dir()).get(vm).memory_directory.exists()
    control = Path(call("PUT", f"/v1/engines/{vm}")["control"])
    order = Snapshot(incremental=incremental, release=not managed, blocks=blocks == "auto")
    _tell(ask_snapshot(control, order), output)


@snapshot.command(epilog="Example: outboard snapshot restore web-20260101T120000-1a2b3c --name web2")
@click.argument("snapshot")
@click.option("--name", help="What to call the VM; as it was called when not given.")
@click.option("--eager", is_flag=True, help="Bring all its memory in before it runs.")
@output_option("table", "json")
def restore(snapshot: str, name: str | None, eager: bool, output: str) -> None:
    """Start a VM as it was when the snapshot was taken.

    It runs at once; its memory comes when it is touched, and ahead of that. Disks that it writes to are overlays of its
    own. Any number of VMs can be restored from a snapshot, under names of their own.
    """
    began = time.monotonic()
    meta = snapshot_format.read(snapshot_dir() / f"{snapshot_format.check_id(snapshot)}{SUFFIX}").meta
    vm = meta.vm if name is None else name
    call("POST", "/v1/restores", {"vm": vm, "snapshot": snapshot, "eager": eager})
    done = Began(vm=vm, snapshot=snapshot, running=meta.running, seconds=time.monotonic() - began)
    if output == "json":
        print_json(done)
    else:
        click.echo(f"{vm} {'runs' if meta.running else 'is there, paused'} after {done.seconds:.2f} s")


@snapshot.command("ls", epilog="Example: outboard snapshot ls")
@output_option("table", "json")
def list_(output: str) -> None:
    """List the snapshots of this host."""
    found = catalog.listed(snapshot_dir())
    if output == "json":
        print_json(Snapshots(found))
        return
    rows = [
        [
            one.id,
            time.strftime("%F %T", time.localtime(one.created)) if one.damage is None else one.damage,
            size_text(one.memory),
            size_text(one.new),
            size_text(one.file),
            one.parent or "",
        ]
        for one in found
    ]
    print_table(["snapshot", "taken", "memory", "new", "on disk", "goes on from"], rows, empty="no snapshots")


@snapshot.command(epilog="Example: outboard snapshot verify web-20260101T120000-1a2b3c")
@click.argument("snapshot")
@output_option("table", "json")
def verify(snapshot: str, output: str) -> None:
    """Read every byte of a snapshot, and of those that it goes on from, and check it."""
    verified = catalog.verify(snapshot_dir(), snapshot)
    if output == "json":
        print_json(verified)
    else:
        click.echo(f"{snapshot} is whole: {verified.files} files, {size_text(verified.bytes)}")


def _in_use(directory: Path) -> Iterator[tuple[str, str]]:
    """Snapshots that VMs of this host still have pages in, and whose."""
    for record in Registry(runtime_dir()).list():
        source = source_of(record.memory_directory)
        if record.alive and source is not None:
            for contents in open_chain(directory, source.snapshot):
                yield contents.meta.id, record.name


@snapshot.command(epilog="Example: outboard snapshot rm web-20260101T120000-1a2b3c")
@click.argument("snapshot")
@output_option("table", "json")
def rm(snapshot: str, output: str) -> None:
    """Remove a snapshot, unless another goes on from it or a VM still has pages in it; the disks stay."""
    catalog.remove(snapshot_dir(), snapshot, _in_use(snapshot_dir()))
    if output == "json":
        print_json(Removed(snapshot))
    else:
        click.echo(f"{snapshot} is removed")
