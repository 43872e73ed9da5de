"""outboard blocks, recover: what of a VM's memory its disks hold, and pages that are put back from there."""

from __future__ import annotations

import contextlib

import click
import numpy as np
from numpy.typing import NDArray

from outboard.agent.config import runtime_dir, state_dir
from outboard.agent.engine import INDEXES
from outboard.agent.orders import Learn, Recover
from outboard.blocks.share import ImageShare, Shares, shares
from outboard.cli.memory import managed, tell
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.errors import OutboardError
from outboard.vmm.enlighten import classes_of
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_spec

_AGENT_S = 10.0


@click.command(epilog="Example: outboard blocks web")
@click.argument("vm")
@click.option(
    "--learn", is_flag=True, help="Have the engine that manages the VM know these pages, to replace them by recover."
)
@output_option("table", "json")
def blocks(vm: str, learn: bool, output: str) -> None:
    """Show how much of a VM's resident memory equals blocks of its disks, and which images hold it.

    What an image holds is kept in an index, made the first time. The VM is not paused, and nothing is changed.
    """
    if learn:
        tell(managed(vm, Learn()), output)
        return
    record = Registry(runtime_dir()).get(vm)
    disks = parse_spec(record.spec_text(), f"the spec of {vm}").disks
    with record.attach(managed=True) as guest:
        classes: NDArray[np.uint8] | None = None
        if guest.agent_path is not None:
            with contextlib.suppress(OutboardError):
                classes = classes_of(guest, guest.agent_path, _AGENT_S)
        found = shares(guest, disks, state_dir() / INDEXES, classes)
    if output == "json":
        print_json(found)
    else:
        _show(found)


def _words(one: ImageShare) -> str:
    kind = "nobody writes to it" if one.fixed else "written to: true for now"
    made = f"index made in {one.index_s:.1f} s" if one.built else "index kept"
    return f"{one.path} ({kind}; {made}, {size_text(one.index)})"


def _show(found: Shares) -> None:
    def part(octets: int) -> list[str]:
        return [size_text(octets), f"{octets / max(1, found.resident):.1%}"]

    click.echo(
        f"{found.vm}: {size_text(found.resident)} of {size_text(found.memory)} resident; looked up in "
        f"{found.seconds:.2f} s, of which {found.match_s:.2f} s to read and compare"
    )
    rows = [
        [f"disk {one.disk}, {'top' if not one.depth else f'{one.depth} below'}", *part(one.matched)]
        for one in found.images
    ]
    rows.append(["zeros", *part(found.zero)])
    if found.free is not None:
        rows.append(["free in the guest", *part(found.free)])
    rows.append(["found nowhere", *part(found.unmatched)])
    print_table(["WHERE", "MEMORY", "SHARE"], rows, empty="")
    if found.classes:
        click.echo()
        print_table(
            ["IN THE GUEST", "RESIDENT", "ON A DISK", "ZEROS"],
            [[one.kind, *map(size_text, (one.resident, one.matched, one.zero))] for one in found.classes],
            empty="",
        )
    for one in found.images:
        click.echo(_words(one))
    for left in found.left:
        click.echo(f"left out ({left.reason}): {left.words}")


@click.command(epilog="Example: outboard recover web --page 74565")
@click.argument("vm")
@click.option("--page", type=click.IntRange(0), required=True, help="The page whose memory has failed, by its number.")
@output_option("table", "json")
def recover(vm: str, page: int, output: str) -> None:
    """Replace a page whose memory has failed by what a disk of the VM's holds, while the VM runs.

    The VM must be managed, and the page known since outboard blocks VM --learn and not written to since then. Else it
    is refused with exit code 4, and nothing is changed: what the page held is lost.
    """
    tell(managed(vm, Recover(page)), output)
