"""script/bench inside: what breaking large pages would free, estimated and then done, and none broken without need.

Clones in large mappings of ordinary shared memory. The estimate keeps one content in four; the truth is what sharing
frees once every large page has been broken, counted in pages of memory. Before that, rounds of sharing without
pressure; afterwards they are made large again.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from outboard.pages import LARGE, PAGE_SIZE
from outboard.sharing.domain import Domain
from outboard.sharing.inside import tlb_cost
from outboard.sharing.pool import Pool
from outboard.sharing.scan import SECRET
from tests.support.machine import transparent_huge_pages
from tests.support.sharing import ProcessMember, blocks_of
from tests.support.target import Target

from .claims import Claim, claim, publish
from .sharing import contents

_EVERY = 4


@dataclass
class Ran:
    """One run; pages, large pages, TLB entries."""

    large: int
    broken_without_pressure: int
    estimated: float
    error: float
    truth: int
    broken: int
    entries: int
    rebuilt: int


def run(mebibytes: int, seed: int) -> Ran:
    """Estimate, leave alone, break, and rebuild."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    pool = Pool(directory / "pool", np.random.default_rng(1))
    members: list[ProcessMember] = []
    try:
        with transparent_huge_pages():
            for number, clone in enumerate(contents(mebibytes, seed)):
                target = Target("thp", mebibytes=mebibytes)
                members.append(ProcessMember(str(number), directory, pool.fileno(), target=target))
                members[-1].guest.memory.write(0, clone.reshape(-1).data)
            domain = Domain(members, pool, np.frombuffer(os.urandom(SECRET), dtype=np.uint8).copy())
            large = _large(members)
            for _ in range(3):
                domain.round()
            left = _large(members)
            estimate = domain.inside(_EVERY)
            before = _used(members, pool)
            domain.reclaim(1 << 60, 1)
            for _ in range(2):
                domain.round()
            broken = sum(len(blocks) for blocks in domain.broken)
            truth = before - _used(members, pool)
            entries = tlb_cost(broken, 0.0, 0.0).entries
            rebuilt, failures = domain.rebuild()
            if failures:
                raise RuntimeError(f"{failures}")
            return Ran(large, large - left, estimate.pages, estimate.error, truth, broken, entries, rebuilt)
    finally:
        for member in members:
            member.close()
        pool.close()
        shutil.rmtree(directory)


def _large(members: list[ProcessMember]) -> int:
    return sum(len(member.large()) for member in members) // LARGE


def _used(members: list[ProcessMember], pool: Pool) -> int:
    return sum(member.resident() for member in members) + blocks_of(pool.fileno()) // PAGE_SIZE


def claims_of(runs: list[Ran]) -> list[Claim]:
    """What the estimate and the breaking must reach."""
    count = len(runs)
    off = [abs(one.estimated - one.truth) / one.truth for one in runs]
    small = [max(0, one.broken - one.rebuilt) for one in runs]
    return [
        claim("estimate, off the truth", statistics.median(off), 0.05, "", count, spread=(min(off), max(off))),
        claim("large pages broken without pressure", max(one.broken_without_pressure for one in runs), 0, "", count),
        claim("broken large pages not made large again", max(small), 0, "", count),
    ]


@click.command()
@click.option("--runs", default=3, show_default=True)
@click.option("--mib", default=64, show_default=True, help="Memory of each clone.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
def main(runs: int, mib: int, file: Path | None) -> None:
    """Estimate, and find out."""
    console = Console(stderr=True)
    ran = []
    for number in range(runs):
        ran.append(run(mib, number))
        console.print(f"{ran[-1]}")
    claims = claims_of(ran)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
