"""outboard swap, outboard reclaim: how much memory of VMs is promised room on the disk, and who is to give some."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import click
import msgspec

from outboard.agent.config import runtime_dir
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Look, Looked, Reclaim, ask
from outboard.agent.promises import configured, pools_of, promises
from outboard.cli.api import call
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.errors import NotFoundError, UsageError
from outboard.reclaim.controller import MOST_REFAULTS
from outboard.reclaim.pools import ROOT
from outboard.stores.reservation import Reservation
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_size

_SHORT = re.compile(r"(\d+)([KMGT])")


class PoolStatus(msgspec.Struct, frozen=True):
    """A pool, ``""`` for the whole reservation; in bytes."""

    pool: str
    reservation: int
    limit: int | None
    shares: int
    promised: int
    needed: int
    used: int


class VmStatus(msgspec.Struct, frozen=True):
    """A VM that runs, or has a swap file; ``used`` on the disk, of it ``lent`` inside the reservation, in bytes."""

    vm: str
    pool: str
    promised: int
    used: int
    lent: int


class SwapStatus(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.swap.v1"):
    """The reservation; sizes in bytes, blocks of 512 bytes as st_blocks counts them."""

    directory: str
    way: str
    reservation: int
    lost: int
    blocks: int
    blocks_reserved: int
    pools: list[PoolStatus]
    vms: list[VmStatus]


def status_of() -> SwapStatus:
    """How the reservation of this host stands.

    :raise NotFoundError: there is none.
    """
    config = configured()
    pools = None if config is None else pools_of(config)
    if config is None or config.swap is None or pools is None:
        raise NotFoundError("no swap is reserved on this host; add [swap] with a reservation to agent.toml")
    if not config.swap.place.exists():
        raise NotFoundError(f"nothing is reserved in {config.swap.place} yet; outboard agent does that as it starts")
    promised = promises(Registry(runtime_dir()))
    reservation = Reservation(config.swap.place, config.swap.reservation_bytes, make=False)
    with contextlib.closing(reservation):
        now, files, lent = reservation.statistics(), reservation.names(), reservation.lent_by_name()
    vms = [
        VmStatus(
            vm,
            promised[vm].pool if vm in promised else ROOT,
            promised[vm].size if vm in promised else 0,
            files.get(vm, 0) * 512 + lent.get(vm, 0),
            lent.get(vm, 0),
        )
        for vm in sorted({*promised, *files})
    ]

    def used(pool: str) -> int:
        return sum(vm.used for vm in vms if pool == ROOT or f"{vm.pool}/".startswith(f"{pool}/"))

    return SwapStatus(
        directory=str(config.swap.place),
        way=now.way,
        reservation=now.promisable,
        lost=now.lost,
        blocks=now.blocks,
        blocks_reserved=now.blocks_reserved,
        pools=[
            PoolStatus(one.pool, one.reservation, one.limit, one.shares, one.promised, one.needed, used(one.pool))
            for one in pools.use(promised)
        ],
        vms=vms,
    )


@click.group()
def swap() -> None:
    """The swap reservation: room on the disk for all that VMs may ever have swapped out."""


@swap.command(epilog="Example: outboard swap status -o json")
@output_option("table", "json")
def status(output: str) -> None:
    """Show what is reserved, promised and used, by pool and by VM, and the blocks on the disk."""
    found = status_of()
    if output == "json":
        print_json(found)
        return
    click.echo(
        f"{size_text(found.reservation)} reserved in {found.directory}; units are got by {found.way}; "
        f"{found.blocks} blocks on the disk, {found.blocks_reserved} reserved"
    )
    if found.lost:
        click.echo(f"{size_text(found.lost)} were snatched on a full disk and will be reserved again when it has room")
    columns = ["pool", "reservation", "limit", "shares", "promised", "used"]
    rows = [
        [
            one.pool or "(all)",
            size_text(one.reservation),
            "-" if one.limit is None else size_text(one.limit),
            str(one.shares),
            size_text(one.promised),
            size_text(one.used),
        ]
        for one in found.pools
    ]
    print_table(columns, rows, empty="")
    rows = [[vm.vm, vm.pool or "-", size_text(vm.promised), size_text(vm.used), size_text(vm.lent)] for vm in found.vms]
    print_table(["vm", "pool", "promised", "used", "of it lent"], rows, empty="no VM runs here")


class TargetSize(click.ParamType[int]):
    """``512MiB``, or ``512M`` for short."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        short = _SHORT.fullmatch(str(value))
        try:
            return parse_size(f"{short[1]}{short[2]}iB" if short else str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(epilog="Example: outboard reclaim web --target 512M")
@click.argument("vm")
@click.option("--target", type=TargetSize(), help="How much memory the VM is to take at most.")
@click.option("--stop", is_flag=True, help="Aim at nothing any more; what is away comes back when it is touched.")
@click.option(
    "--most-faults",
    type=click.FloatRange(0),
    default=MOST_REFAULTS,
    show_default=True,
    help="Pages a second that the VM may want back before it is left alone for a while.",
)
@output_option("table", "json")
def reclaim(vm: str, target: int | None, stop: bool, most_faults: float, output: str) -> None:
    """Bring the memory that a running VM takes down to a target, and keep it there.

    What it touched least goes first, to its swap file. As long as it wants too much of it back, nothing more is taken:
    then the VM stays above the target. Returns at once; outboard reclaim VM shows how far it is.
    """
    if stop and target is not None:
        raise UsageError("--stop and --target cannot both be meant")
    if target is not None:
        control = Path(call("PUT", f"/v1/engines/{vm}")["control"])
        looked = ask(control, Reclaim(target=target, most_refaults=most_faults))
    else:
        looked = _managed(vm, stop=stop)
    if output == "json":
        print_json(looked)
        return
    click.echo(_words(looked))


def _managed(vm: str, *, stop: bool) -> Looked:
    directory = Registry(runtime_dir()).get(vm).memory_directory
    if not directory.exists():
        raise NotFoundError(f"the memory of {vm} is not managed; outboard reclaim {vm} --target SIZE begins that")
    return ask(directory / CONTROL, Reclaim(target=None) if stop else Look())


def _words(looked: Looked) -> str:
    now = looked.reclaim
    if now is None:
        return f"{looked.vm} takes {size_text(looked.used)}; nothing is reclaimed"
    words = f"{looked.vm} takes {size_text(looked.used)}, and is to take {size_text(now.target)}"
    if now.goal > now.target:
        words += f"; it wants what was taken back, and is left {size_text(now.goal)} for now"
    return f"{words}; {now.refault_rate:.0f} pages/s came back"
