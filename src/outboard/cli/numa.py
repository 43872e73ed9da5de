"""outboard numa: where memory is near, and where far."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

from outboard.agent.config import state_dir
from outboard.cli.numa_guests import move, show
from outboard.cli.numa_placing import balance, place
from outboard.cli.output import output_option, print_json, print_table
from outboard.errors import OutboardError, UsageError
from outboard.numa import policies as moves
from outboard.numa.topology import Topology, keep, load, read_topology, with_kept

_LEAST, _MOST = 1, 1 << 16
_BYTES = 1 << 20


@click.group()
def numa() -> None:
    """Hosts whose memory is nearer to some processors than to others."""


for _command in (show, move, place, balance):
    numa.add_command(_command)


def _memory_text(octets: int) -> str:
    return f"{octets / (1 << 30):.1f} GiB" if octets else "-"


def _ranges(numbers: list[int]) -> str:
    """Numbers as the kernel prints them, ``0-2,8``."""
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and parts[-1][1] == one - 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts) or "-"


def _tell(topology: Topology) -> None:
    cores = {one.core for one in topology.processors}
    threads = len(topology.processors) // max(1, len(cores))
    caches = {f"L{one.level} {one.size / _BYTES:.1f} MiB" for one in topology.caches}
    click.echo(
        f"{len(topology.nodes)} nodes, {len(cores)} cores with {threads} threads each, "
        f"{len(topology.caches)} last-level caches ({', '.join(sorted(caches)) or 'size not told'})"
    )
    columns = ["NODE", "PROCESSORS", "MEMORY", *(f"TO {node.number}" for node in topology.nodes)]
    rows = [
        [str(node.number), _ranges(node.processors), _memory_text(node.memory), *map(str, node.distances)]
        for node in topology.nodes
    ]
    print_table(columns, rows, empty="")
    told = "measured" if topology.latencies is not None else "guessed from the distances; --measure finds out"
    click.echo(f"\nns of an access, idle / its bandwidth in use, {told}:")
    idle, loaded = topology.between_nodes(), topology.between_nodes(loaded=True)
    origins = [node for node in topology.nodes if node.processors]
    rows = [
        [str(node.number), *(f"{one:.0f} / {two:.0f}" for one, two in zip(idle[row], loaded[row], strict=True))]
        for row, node in enumerate(origins)
    ]
    print_table(["FROM NODE", *(f"TO {node.number}" for node in topology.nodes)], rows, empty="")


@numa.command(epilog="Example: outboard numa topology --measure -o json > host.json")
@click.option("--measure", is_flag=True, help="Measure latencies now, and keep them for this host.")
@click.option(
    "--size", type=click.IntRange(_LEAST, _MOST), help="MiB of the buffer that is measured with; 4 x the cache."
)
@click.option("--from", "source", type=click.Path(path_type=Path), help="A topology in a file, instead of this host's.")
@output_option("table", "json")
def topology(measure: bool, size: int | None, source: Path | None, output: str) -> None:
    """Show nodes, distances, caches, and the latency from each processor to each node's memory.

    Latencies are those last measured on this host; a guess where there are none. Measuring them takes about a
    fifth of a second for each processor and node, and keeps the host's processors busy meanwhile.
    """
    kept = state_dir() / "numa.json"
    if source is not None and measure:
        raise UsageError("--from shows a file and --measure this host; give one of them")
    if size is not None and not measure:
        raise UsageError("--size is for --measure; give both")
    if source is not None:
        found = load(source)
    elif measure:
        # What compiles its loops is imported when it is needed.
        from outboard.numa.measuring import measure as measured

        def progress(node: int, processor: int) -> None:
            if sys.stderr.isatty():
                click.echo(f"\rnode {node}, processor {processor} ", nl=False, err=True)

        found = measured(read_topology(), np.random.default_rng(), (size or 0) * _BYTES, progress)
        if sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
        try:
            keep(found, kept)
        except OSError as error:
            raise OutboardError(f"cannot keep what was measured in {kept}: {error.strerror}") from error
    else:
        found = with_kept(read_topology(), kept)
    if output == "json":
        print_json(found)
    else:
        _tell(found)


@numa.command(name="policies", epilog="Example: outboard numa policies")
@output_option("table", "json")
def list_policies(output: str) -> None:
    """The orders in which memory can follow its vCPUs, and when to use each."""
    if output == "json":
        for policy in moves.POLICIES.values():
            print_json(policy)
    else:
        print_table(["POLICY", "USE IT"], [[policy.name, policy.use] for policy in moves.POLICIES.values()], empty="")
