"""script/bench numa_sim: every policy on a simulated host of eight nodes and 1 TiB, and 1,000 vCPUs placed on it.

The guests' vCPUs go from their memory's node to the next one at the same instant, and the memory follows by each
policy: the code that orders moves is the one that a real host runs; only how long copying takes is made up
(``outboard.numa.simulation``). Accesses are Zipf-distributed over units of 2 MiB. The outcome is the same in every run.
How long it takes to decide is measured, in processor time.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from outboard.numa.moving import Limits
from outboard.numa.placement import Load, Model, Vcpu
from outboard.numa.policies import POLICIES
from outboard.numa.simulation import UNIT, Host, Outcome, Recording, Simulation
from outboard.numa.topology import Topology
from tests.support.topologies import recorded

from .claims import claim, publish

_GIB = 1 << 30
_GUESTS, _VCPUS = 96, 1000
_STEP_S = 0.2


def guests_of(topology: Topology, fill: float, exponent: float) -> tuple[list[Recording], list[int]]:
    """Guests that fill their nodes alike, and the nodes that their vCPUs have gone to."""
    count = len(topology.nodes)
    units = int(topology.nodes[0].memory * fill) // UNIT // (_GUESTS // count)
    ranks: NDArray[np.float32] = (1e6 / np.arange(1, units + 1) ** exponent).astype(np.float32)
    guests, to = [], []
    for number in range(_GUESTS):
        random = np.random.default_rng(number)
        heat: NDArray[np.float32] = ranks[random.permutation(units)][None, :]
        written: NDArray[np.float32] = heat * random.uniform(0, 0.6, units).astype(np.float32)
        home = number % count
        guests.append(Recording(heat, written, np.full(units, home, dtype=np.int16), 2))
        to.append((home + 1) % count)
    return guests, to


def vcpus_of(topology: Topology, seed: int) -> list[Vcpu]:
    """vCPUs with working sets of 1 MiB to 64 GiB that lie on several nodes."""
    random = np.random.default_rng(seed)
    sizes = 2.0 ** random.uniform(20, 36, _VCPUS)
    shares = random.dirichlet([0.4] * len(topology.nodes), _VCPUS)
    processors = random.integers(0, len(topology.processors), _VCPUS)
    return [
        Vcpu(f"vm-{row // 4}", row % 4, (sizes[row] * shares[row]).astype(np.int64).tolist(), processor=int(at))
        for row, at in enumerate(processors)
    ]


def _moved_by(outcome: Outcome, share: float) -> int:
    at = outcome.until(share)
    return outcome.moved[outcome.times.index(at)] if at in outcome.times else 0


def _show(outcomes: dict[str, Outcome]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "policy",
        "90 % local after",
        "moved by then",
        "in the end local",
        "ns an access",
        "moved",
        "made room",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, outcome in outcomes.items():
        reached = outcome.until(0.9)
        table.add_row(
            name,
            f"{reached:.2f} s" if np.isfinite(reached) else "never",
            f"{_moved_by(outcome, 0.9) * UNIT / _GIB:.0f} GiB" if np.isfinite(reached) else "",
            f"{outcome.local[-1]:.1%}",
            f"{outcome.latency[-1]:.0f}",
            f"{outcome.moved[-1] * UNIT / _GIB:.0f} GiB",
            f"{outcome.left[-1] * UNIT / _GIB:.0f} GiB",
        )
    Console().print(table)


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option(
    "--fill", type=click.FloatRange(0.05, 1), default=0.75, show_default=True, help="Part of the memory in use."
)
@click.option("--zipf", type=click.FloatRange(0.1, 3), default=1.1, show_default=True, help="Exponent of the accesses.")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=60.0, show_default=True, help="Simulated time.")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Of the placement.")
def main(file: Path | None, fill: float, zipf: float, seconds: float, runs: int) -> None:
    """Simulate each policy on eight nodes, and place 1,000 vCPUs on them."""
    topology = recorded("eight")
    guests, to = guests_of(topology, fill, zipf)
    outcomes = {}
    for name, policy in POLICIES.items():
        began = time.process_time()
        simulation = Simulation(topology, guests, policy, Limits(batch=64, tail=256), Host(), to)
        outcomes[name] = simulation.run(seconds, _STEP_S, seconds * 2)
        click.echo(f"{name}: simulated in {time.process_time() - began:.1f} s", err=True)
    _show(outcomes)
    took = []
    for run in range(runs + 1):
        vcpus = vcpus_of(topology, run)
        began = time.process_time()
        Model(topology, Load()).place(vcpus)
        took.append(time.process_time() - began)
    took = took[1:]  # the first loads what is compiled
    hottest, address = outcomes["hottest-first"], outcomes["address"]
    claims = [
        claim(
            "time until 90 % is local",
            hottest.until(0.9),
            0.4,
            "s",
            1,
            peer=address.until(0.9),
            against="address order",
        ),
        claim(
            "units moved until 90 % is local",
            _moved_by(hottest, 0.9),
            0.4,
            "units",
            1,
            peer=_moved_by(address, 0.9),
            against="address order",
        ),
        claim("1,000 vCPUs placed on 8 nodes", statistics.median(took), 1.0, "s", runs, spread=(min(took), max(took))),
    ]
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
