"""outboard numa place, balance: binding a running VM's threads to the nodes where its memory is, with reasons."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from outboard.agent.config import runtime_dir, state_dir
from outboard.cli.attach import memory_options, open_memory
from outboard.cli.numa_guests import seen, watch_option
from outboard.cli.output import output_option, print_json
from outboard.errors import KernelError, NotFoundError, UsageError
from outboard.linux import proc
from outboard.numa import rivals
from outboard.numa.balance import proposals
from outboard.numa.living import bindings, price, vcpus_of, working_set
from outboard.numa.placement import Model, Vcpu
from outboard.numa.policies import Memory
from outboard.numa.residents import Resident, bind, load_of_others, put_back, residents
from outboard.numa.settling import Rules, Settler
from outboard.numa.topology import Topology, read_topology, with_kept
from outboard.numa.whereabouts import Whereabouts, unit_of
from outboard.vmm.guest import Guest
from outboard.vmm.registry import Registry

_BUSY_S = 0.5


class Placed(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-placement.v1"):
    """What is done with a VM's threads and why; costs are the expected ns of an access, weighted by how busy each is.

    :ivar threads: the processors of each.
    """

    vm: str
    done: bool
    now: float
    then: float
    threads: dict[int, list[int]]
    reasons: list[str]
    warnings: list[str]


class _Looked(NamedTuple):
    guest: Guest
    threads: list[Resident]
    vcpus: list[Vcpu]
    memory: Memory
    unit_bytes: int


def host() -> Topology:
    """This host, with the latencies that were measured on it."""
    return with_kept(read_topology(), state_dir() / "numa.json")


def _kept(guest: Guest) -> Path:
    """Where a guest's former affinities are; a process's start tells it from another of the same number."""
    return runtime_dir() / "numa" / f"{guest.pid}-{proc.start_time(guest.pid)}.json"


def _look(guest: Guest, topology: Topology, seconds: float) -> _Looked:
    per = unit_of(guest)
    memory = seen(guest, per, seconds)
    with Whereabouts(guest, per) as where:
        memory = memory._replace(node=where.nodes(mapping=seconds > 0))
        unit = where.unit_bytes
    threads = residents(guest, _BUSY_S)
    return _Looked(guest, threads, vcpus_of(guest.name, threads, working_set(memory, topology, unit)), memory, unit)


@click.command(epilog="Example: outboard numa place web --dry-run")
@memory_options
@watch_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--release", is_flag=True, help="Put the threads back to what they might run on before.")
@output_option("table", "json")
def place(
    vm: str | None, qmp: Path | None, pid: int | None, seconds: float, dry_run: bool, release: bool, output: str
) -> None:
    """Bind a running VM's threads to the nodes where its memory is near, and say why.

    vCPUs are placed one by one; the emulator and I/O threads go to the node where most of the vCPUs' work is. Within a
    node the kernel's scheduler chooses. The memory stays where it is: outboard numa move has it follow.
    """
    with open_memory(vm, qmp, pid) as guest:
        if release:
            if dry_run:
                raise UsageError("--release puts back what was done, and --dry-run does nothing; give one of them")
            click.echo(f"{guest.name}: {put_back(guest, _kept(guest))} threads may run where they might before")
            return
        topology = host()
        looked = _look(guest, topology, seconds)
        model = Model(topology, load_of_others({guest.pid}))
        found = model.place(looked.vcpus)
        apply = not dry_run and len(topology.nodes) > 1
        wanted = bindings(topology, looked.threads, found.processors)
        if apply:
            bind(guest, wanted, _kept(guest))
        told = Placed(
            guest.name,
            apply,
            found.now,
            found.cost,
            wanted,
            model.reasons(looked.vcpus, found),
            rivals.warnings(),
        )
    if output == "json":
        print_json(told)
        return
    if len(topology.nodes) == 1:
        click.echo(f"{told.vm}: this host has one node, and no processor is nearer to memory than another")
        return
    for line in [*told.reasons, *(f"warning: {one}" for one in told.warnings)]:
        click.echo(line)
    gain = 1 - told.then / told.now if told.now > 0 else 0.0
    click.echo(
        f"{'bound' if told.done else 'would bind'} {len(wanted)} threads; accesses take {max(0.0, gain):.0%} less"
    )


class Balanced(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-balance.v1"):
    """What was decided for a VM, and why."""

    vm: str
    seconds: float
    moved: bool
    words: str


@click.command(epilog="Example: outboard numa balance --watch --interval 10")
@click.argument("vms", nargs=-1)
@click.option("--pid", "pids", type=int, multiple=True, help="A process that Outboard did not start; may be repeated.")
@click.option("--watch", "keep", is_flag=True, help="Go on, and place what has been worth it for a while.")
@click.option("--interval", type=click.FloatRange(0.5, 3600), default=10.0, show_default=True, help="Seconds.")
@click.option("--look", type=click.FloatRange(0, 60), default=2.0, show_default=True, help="Seconds of each look.")
@click.option("--rounds", type=click.IntRange(1), help="End after so many.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@output_option("table", "ndjson")
def balance(
    vms: tuple[str, ...],
    pids: tuple[int, ...],
    keep: bool,
    interval: float,
    look: float,
    rounds: int | None,
    dry_run: bool,
    output: str,
) -> None:
    """Say which VMs another placement would serve better, and with --watch place them once that has lasted.

    Without names, all VMs of this host. A VM that was placed rests, and is not placed back soon: see the documentation.
    Without --watch nothing is changed.
    """
    topology = host()
    settlers: dict[tuple[int, int], Settler] = {}
    began, number = time.monotonic(), 0
    for words in rivals.warnings():
        click.echo(f"warning: {words}", err=True)
    while True:
        number += 1
        with ExitStack() as stack:
            looked = {one.guest.name: one for one in _all(stack, vms, pids, topology, look)}
            _decide(looked, topology, settlers, time.monotonic() - began, keep and not dry_run, output)
        if not keep or number == rounds:
            return
        time.sleep(interval)


def _all(
    stack: ExitStack, vms: tuple[str, ...], pids: tuple[int, ...], topology: Topology, look: float
) -> list[_Looked]:
    """Look at each VM; one that ends meanwhile is left out, unless it was named and is not there."""
    everything = not vms and not pids
    names: list[str] = [one.name for one in Registry(runtime_dir()).list() if one.alive] if everything else list(vms)
    found: list[_Looked] = []
    for name, pid in [*((one, None) for one in names), *((None, one) for one in pids)]:
        with contextlib.ExitStack() as mine:
            try:
                guest = mine.enter_context(open_memory(name, None, pid))
                found.append(_look(guest, topology, look))
            except (NotFoundError, KernelError):
                if not everything:
                    raise
                continue
            stack.push(mine.pop_all())
    if not found:
        raise NotFoundError("no VM runs on this host; outboard run starts one, and --pid takes any process")
    return found


def _decide(
    looked: dict[str, _Looked],
    topology: Topology,
    settlers: dict[tuple[int, int], Settler],
    seconds: float,
    apply: bool,
    output: str,
) -> None:
    load = load_of_others({one.guest.pid for one in looked.values()})
    vcpus = [vcpu for one in looked.values() for vcpu in one.vcpus]
    nodes = [node.number for node in topology.nodes if node.processors]
    prices = {name: min(price(one.memory, one.unit_bytes, [node]) for node in nodes) for name, one in looked.items()}
    for name, proposal in proposals(topology, load, vcpus, prices).items():
        one = looked[name]
        key = (one.guest.pid, proc.start_time(one.guest.pid))
        decision = settlers.setdefault(key, Settler(Rules())).consider(proposal.offer, seconds)
        if decision.move and apply:
            bind(one.guest, bindings(topology, one.threads, proposal.processors), _kept(one.guest))
        if output == "ndjson":
            print_json(Balanced(name, seconds, decision.move and apply, decision.words))
        else:
            click.echo(f"{seconds:7.1f} s  {name}: {'placed: ' if decision.move and apply else ''}{decision.words}")
