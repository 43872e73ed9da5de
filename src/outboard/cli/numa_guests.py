"""outboard numa show, move: on which nodes a running VM's memory is, and having it follow its vCPUs."""

from __future__ import annotations

import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from outboard.cli.attach import memory_options, open_memory
from outboard.cli.output import Bandwidth, Duration, output_option, print_json, print_table, size_text
from outboard.errors import OutboardError, UsageError
from outboard.linux.numa import node_of_thread
from outboard.numa import rivals
from outboard.numa.following import Follower, Progress
from outboard.numa.kernels import urgent
from outboard.numa.moving import Limits, Mover, Pace, Rests
from outboard.numa.policies import ABSENT, POLICIES, UNKNOWN, Memory, Policy, local_share, only, order_of
from outboard.numa.warmth import watch
from outboard.numa.whereabouts import Whereabouts, backends, free_of, unit_of
from outboard.vmm.enlighten import classes_of
from outboard.vmm.guest import Guest, QemuGuest

_BATCH, _LEAST, _MOST_BYTES = 64, 16, 1 << 30
"""The first batch and the least, in small pages, and the largest in bytes."""
_RETURN_S = 300.0
_TELL_S = 0.5
_AGENT_S = 5.0


class NodeShare(msgspec.Struct, frozen=True):
    """What of a guest is on a node, in bytes; ``accesses``: the part of all that were seen."""

    node: int
    memory: int
    touched: int
    accesses: float


class VcpuPlace(msgspec.Struct, frozen=True):
    """The node that a vCPU's thread last ran on, -1 where that cannot be told; ``remote``: the part of the guest's
    accesses that is not to memory there, whichever vCPU they are of."""

    vcpu: int
    thread: int
    node: int
    remote: float


class GuestOnNodes(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-guest.v1"):
    """Where a guest is. ``unmapped``: bytes that are in no page table, of which the kernel tells no node."""

    vm: str
    memory: int
    unmapped: int
    watched: float
    nodes: list[NodeShare]
    vcpus: list[VcpuPlace]


def _share(memory: Memory, node: int) -> float:
    return local_share(memory, node) if memory.heat.any() else 0.0


def where_is(guest: Guest, memory: Memory, unit_bytes: int, watched: float) -> GuestOnNodes:
    """A guest's memory and vCPUs by node; heat of zero all over where it was not watched."""
    there = memory.node != ABSENT
    nodes = [
        NodeShare(
            node,
            int(np.count_nonzero(memory.node == node)) * unit_bytes,
            int(np.count_nonzero((memory.node == node) & (memory.heat > 0))) * unit_bytes,
            _share(memory, node),
        )
        for node in np.unique(memory.node[there]).tolist()
    ]
    vcpus = []
    for vcpu in guest.vcpus:
        node = node_of_thread(guest.pid, vcpu.tid)
        vcpus.append(VcpuPlace(vcpu.index, vcpu.tid, node, 1 - _share(memory, node) if watched else 0.0))
    unmapped = int(np.count_nonzero(~there)) * unit_bytes
    return GuestOnNodes(guest.name, memory.node.size * unit_bytes, unmapped, watched, nodes, vcpus)


def seen(guest: Guest, per: int, seconds: float, *, writes: bool = False) -> Memory:
    """What a guest touches within so many seconds; nothing of all for none."""
    if seconds > 0:
        return watch(guest, per, seconds, writes=writes)
    cold = np.zeros(-(-guest.pages // per))
    return Memory(cold, cold.copy(), np.full(cold.size, UNKNOWN, dtype=np.int16))


watch_option = click.option(
    "--watch",
    "seconds",
    type=click.FloatRange(0, 3600),
    default=5.0,
    show_default=True,
    help="Seconds to look at what the VM touches, which costs it up to 10 µs a page and look; 0: do not.",
)


@click.command(epilog="Example: outboard numa show web --watch 10")
@memory_options
@watch_option
@output_option("table", "json")
def show(vm: str | None, qmp: Path | None, pid: int | None, seconds: float, output: str) -> None:
    """Show on which nodes a running VM's memory is, what of it is used, and where its vCPUs run.

    The VM runs on. Memory that is in no page table (never touched, or in a store) is on no node.
    """
    with open_memory(vm, qmp, pid) as guest:
        per = unit_of(guest)
        memory = seen(guest, per, seconds)
        with Whereabouts(guest, per) as where:
            # What the trace has unmapped is mapped again; else all is told as it is.
            memory = memory._replace(node=where.nodes(mapping=seconds > 0))
            found = where_is(guest, memory, where.unit_bytes, seconds)
    if output == "json":
        print_json(found)
        return
    click.echo(f"{found.vm}: {size_text(found.memory)}, of which {size_text(found.unmapped)} on no node")
    rows = [
        [
            str(one.node),
            size_text(one.memory),
            size_text(one.touched) if found.watched else "-",
            f"{one.accesses:.1%}" if found.watched else "-",
        ]
        for one in found.nodes
    ]
    print_table(["NODE", "MEMORY", f"TOUCHED IN {seconds:g} S", "OF THE ACCESSES"], rows, empty="nothing is mapped")
    if found.vcpus:
        click.echo()
        rows = [
            [
                str(one.vcpu),
                str(one.thread),
                str(one.node) if one.node >= 0 else "-",
                f"{one.remote:.1%}" if found.watched else "-",
            ]
            for one in found.vcpus
        ]
        print_table(["VCPU", "THREAD", "RAN ON NODE", "REMOTE FROM THERE"], rows, empty="")


def _words(told: Progress, unit: int) -> str:
    stayed = "".join(f", {size_text(count * unit)} stayed: {why}" for why, count in told.stayed.items())
    made = f", {size_text(told.left * unit)} left to make room" if told.left else ""
    return (
        f"{told.seconds:6.1f} s  {told.local:6.1%} of the accesses local to node {told.node}, "
        f"{size_text(told.moved * unit)} moved, {size_text(told.to_come * unit)} to come{made}{stayed}; "
        f"longest stall {told.stall * 1e3:.1f} ms"
    )


class _Nodes(click.ParamType[tuple[int, ...]]):
    """``1``, or ``0,1``."""

    name = "nodes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", str(value)):
            self.fail(f"{value!r} names no nodes; write 1, or 0,1", param, ctx)
        return tuple(int(one) for one in str(value).split(","))


def parts(guest: Guest, memory: Memory, per: int, nodes: tuple[int, ...]) -> list[tuple[int, Memory]]:
    """What goes to each node: all of the memory, or of each backend, which stands for a node of the VM's own.

    :raise UsageError: there are more nodes than one, yet not one for each backend.
    """
    found = backends(guest, per)
    if len(nodes) == 1:
        if len(found) > 1:
            words = f"{guest.name} has memory of {len(found)} backends ({', '.join(found)})"
            click.echo(f"warning: {words}: all of it goes to node {nodes[0]}; --to 0,1 names one for each", err=True)
        return [(nodes[0], memory)]
    if len(nodes) != len(found):
        raise UsageError(
            f"--to names {len(nodes)} nodes, and the memory of {guest.name} is of {len(found)} backends "
            f"({', '.join(found)}); name a node for each, or one for all"
        )
    return [(node, only(memory, which)) for node, which in zip(nodes, found.values(), strict=True)]


@click.command(epilog="Example: outboard numa move web --to 1 --policy hot-set --tail 200MB")
@memory_options
@click.option("--to", "nodes", type=_Nodes(), required=True, help="The node; 0,1: one for each node of the VM's own.")
@click.option(
    "--policy",
    "name",
    type=click.Choice(list(POLICIES)),
    default="hottest-first",
    show_default=True,
    help="In what order; outboard numa policies says when to use which.",
)
@watch_option
@click.option(
    "--longest-stall", type=Duration(), default="20ms", show_default=True, help="What a batch may take at most."
)
@click.option("--tail", type=Bandwidth(), default="100MB", show_default=True, help="The background's rate a second.")
@click.option("--pause-balancing", is_flag=True, help="Turn the kernel's NUMA balancing off meanwhile, host-wide.")
@click.option("--dry-run", is_flag=True, help="Only say what would move.")
@output_option("table", "ndjson")
def move(
    vm: str | None,
    qmp: Path | None,
    pid: int | None,
    nodes: tuple[int, ...],
    name: str,
    seconds: float,
    longest_stall: float,
    tail: int,
    pause_balancing: bool,
    dry_run: bool,
    output: str,
) -> None:
    """Have a running VM's memory follow it to a node, and show how much of its accesses is local meanwhile.

    The VM runs on; whoever touches what is just being moved waits until its batch is done. Interrupted, what has moved
    stays where it is; nothing is lost. The share of local accesses is of those that were seen before.
    """
    policy = POLICIES[name]
    for node in nodes:
        free_of(node)
    with open_memory(vm, qmp, pid) as guest:
        per = unit_of(guest)
        if policy.order != "address" and not seconds:
            raise UsageError(f"--policy {name} needs to know what is hot; give --watch more than 0 seconds")
        memory = seen(guest, per, seconds, writes=policy.order == "writes")
        if policy.order != "address":
            memory = _kernel_first(guest, memory, per)
        with Whereabouts(guest, per) as where:
            unit = where.unit_bytes
            for words in rivals.warnings(paused=pause_balancing):
                click.echo(f"warning: {words}", err=True)
            if dry_run:
                # Of all of it, which a move asks about as it goes.
                for node, part in parts(guest, memory._replace(node=where.nodes()), per, nodes):
                    click.echo(f"{guest.name}: {_would(policy, part, node, unit)}", err=output != "table")
                return
            with rivals.balancing_paused() if pause_balancing else nullcontext():
                for node, part in parts(guest, memory, per, nodes):
                    follower = Follower(
                        where,
                        part,
                        Mover(policy, node, Limits(_BATCH, max(1.0, tail / unit)), free_of(node) // unit),
                        Pace(longest_stall, max(1, _BATCH // per), max(1, _MOST_BYTES // unit), max(1, _LEAST // per)),
                        Rests(where.units, _RETURN_S),
                        time.monotonic,
                        time.sleep,
                    )
                    _carry_out(follower, unit, output)


def _kernel_first(guest: Guest, memory: Memory, per: int) -> Memory:
    """What the guest's kernel needs goes first, if it tells."""
    agent = guest.agent_path if isinstance(guest, QemuGuest) else None
    if agent is None:
        return memory
    try:
        classes = classes_of(guest, agent, _AGENT_S)
    except OutboardError as error:
        click.echo(f"warning: what its kernel needs is not known: {error}", err=True)
        return memory
    return memory._replace(urgent=urgent(classes, memory.heat, per))


def _would(policy: Policy, memory: Memory, node: int, unit: int) -> str:
    order, hot = order_of(policy, memory, node, np.zeros(memory.node.size, dtype=np.bool_))
    return (
        f"{size_text(order.size * unit)} not on node {node}, {size_text(hot * unit)} of it "
        f"{'hot' if policy.order != 'address' else 'in order'}; {size_text(free_of(node))} free there; "
        f"{local_share(memory, node):.1%} of the accesses are local"
    )


def _carry_out(follower: Follower, unit: int, output: str) -> None:
    told = time.monotonic()
    while follower.step():
        if time.monotonic() - told >= _TELL_S:
            told = time.monotonic()
            _tell(follower.progress(), unit, output, end="\r" if sys.stdout.isatty() else "\n")
    _tell(follower.progress(), unit, output, end="\n")


def _tell(progress: Progress, unit: int, output: str, end: str) -> None:
    if output == "ndjson":
        print_json(progress)
    else:
        click.echo(_words(progress, unit) + end, nl=False)
