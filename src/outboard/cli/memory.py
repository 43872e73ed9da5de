"""outboard evict, fetch, release, residency, engine upgrade: where a VM's pages live."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from outboard.agent.config import runtime_dir
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Evict, Fetch, Look, Looked, Order, Release, ask
from outboard.cli.api import call
from outboard.cli.output import output_option, print_json, size_text
from outboard.errors import NotFoundError, UsageError
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_size


def tell(looked: Looked, output: str) -> None:
    """Print how things are."""
    if output == "json":
        print_json(looked)
        return
    click.echo(
        f"{looked.vm}: {size_text(looked.memory)}, of which {size_text(looked.resident)} resident, "
        f"{size_text(looked.zero)} zeros, {size_text(looked.pool)} in the pool, {size_text(looked.file)} in the swap "
        f"file, {size_text(looked.disk)} on its disks, {size_text(looked.snapshot)} in a snapshot"
    )
    if looked.faults:
        click.echo(f"faults {looked.faults:,}: p50 {looked.fault_p50_us:.0f} µs, p99 {looked.fault_p99_us:.0f} µs")
    if looked.failure is not None:
        click.echo(f"failure: {looked.failure}")


def managed(vm: str, order: Order) -> Looked:
    """Give an order to the engine that manages ``vm``; nobody else is needed for that."""
    directory = Registry(runtime_dir()).get(vm).memory_directory
    if not directory.exists():
        raise NotFoundError(f"the memory of {vm} is not managed; outboard evict {vm} begins that")
    return ask(directory / CONTROL, order)


@click.command(epilog="Example: outboard evict web --most 200MiB --idle 30")
@click.argument("vm")
@click.option("--most", metavar="SIZE", help="How much at most, such as 200MiB; all that is idle when not given.")
@click.option(
    "--idle", type=click.FloatRange(0), default=5.0, show_default=True, help="Seconds that nobody touched it."
)
@click.option(
    "--to", type=click.Choice(["file", "pool"]), default="file", show_default=True, help="Swap file or memory."
)
@output_option("table", "json")
def evict(vm: str, most: str | None, idle: float, to: str, output: str) -> None:
    """Move idle memory of a running VM out of its memory; it comes back when the VM touches it.

    From then on an engine manages the VM until outboard release lets it go. The VM is not paused.
    """
    try:
        limit = None if most is None else parse_size(most)
    except ValueError as error:
        raise UsageError(f"--most: {error}") from error
    control = Path(call("PUT", f"/v1/engines/{vm}")["control"])
    looked = ask(control, Evict(to=cast(Literal["pool", "file"], to), most=limit, idle=idle))
    if output == "table":
        click.echo(f"evicted {size_text(looked.moved)} that was idle for {idle:g} s")
    tell(looked, output)


@click.command(epilog="Example: outboard fetch web")
@click.argument("vm")
@output_option("table", "json")
def fetch(vm: str, output: str) -> None:
    """Bring every page of a managed VM back before it is touched; it stays managed."""
    tell(managed(vm, Fetch()), output)


@click.command(epilog="Example: outboard release web")
@click.argument("vm")
@output_option("table", "json")
def release(vm: str, output: str) -> None:
    """Bring every page back and let the VM go: nothing of Outboard's stays in its process."""
    tell(managed(vm, Release()), output)


@click.command(epilog="Example: outboard residency web -o json")
@click.argument("vm")
@output_option("table", "json")
def residency(vm: str, output: str) -> None:
    """Show where the pages of a managed VM live, and how long its faults took."""
    tell(managed(vm, Look()), output)


@click.group()
def engine() -> None:
    """The processes that manage VMs' memory, one each."""


@engine.command(epilog="Example: outboard engine upgrade web")
@click.argument("vm")
def upgrade(vm: str) -> None:
    """Have an engine of the agent's present version take a VM over from the one that manages it; no fault is lost."""
    click.echo(f"{vm} is managed by engine {call('POST', f'/v1/engines/{vm}/upgrade')['engine']} now")
