"""script/bench throttle: pre-copy of a VM that writes faster than the link carries, by Outboard and by QEMU.

The demo's VM and job, alone on its core, at 40,000 and 80,000 page writes/s over 256 MiB and 1 Gbit/s. Both throttle:
QEMU's auto-converge all vCPUs, in steps of a tenth; Outboard the vCPUs that write, by its model.

What that costs one that writes nothing is measured apart from everything else that a migration does: a process with a
thread that writes and one that computes, each on a core of its own, the first held to a twentieth and let go in turn.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from demo.arms import Arm
from demo.document import Document
from demo.hosts import ROOT
from demo.outboard_arms import outboard_arms
from demo.qemu_arms import qemu_arms
from demo.scene import Workload
from demo.session import THROTTLED_LIMIT_S, Session
from guest.build import build
from outboard.vmm.brake import Brake
from outboard.vmm.process import attach_process

from .claims import Claim, claim, publish
from .sessions import against
from .stallers import Staller, compiled

OURS, CONVERGE = "outboard-pre-copy", "qemu-auto-converge"
RATES = (40_000, 80_000)
_HELD_S = 3.0


def claims_of(document: Document) -> list[Claim]:
    """What a throttled pre-copy must reach."""
    rate = f"{document.settings.writes_per_s} writes/s"
    return [
        against(document, f"total time, {rate}", "total_s", CONVERGE, 0.5, "s", our_arm=OURS),
        against(document, f"longest gap, {rate}", "longest_gap_ms", CONVERGE, 0.25, "ms", our_arm=OURS),
    ]


def innocent_claim(runs: int) -> Claim:
    """What a thread that writes nothing loses while another is held back."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-bench-"))
    staller = Staller(compiled(directory), "memfd", 64, 0, writer=True)
    try:
        first, second, *_ = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(staller.worker, {first})
        os.sched_setaffinity(staller.writer, {second})
        rates: dict[float, list[float]] = {1.0: [], 0.05: []}
        with attach_process(staller.pid) as guest, Brake(guest, {staller.writer: 1.0}) as brake:
            for _ in range(runs):
                for share, found in rates.items():
                    brake.hold(share)
                    staller.begin()
                    time.sleep(_HELD_S)
                    found.append(staller.end().rate)
    finally:
        staller.close()
        shutil.rmtree(directory)
    free, held = rates[1.0], rates[0.05]
    return claim(
        "work of a thread that writes nothing",
        statistics.median(held),
        0.99,
        "steps/s",
        runs,
        peer=statistics.median(free),
        against="nobody held back",
        spread=(min(held), max(held)),
        at_least=True,
    )


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--rate", "rates", type=int, multiple=True, default=RATES, show_default=True, help="Page writes/s.")
def main(file: Path | None, runs: int, rates: tuple[int, ...]) -> None:
    """Judge throttled pre-copy."""
    image = build(ROOT / ".build/guest")
    arms: list[Arm] = [
        *(arm for arm in outboard_arms(THROTTLED_LIMIT_S) if arm.name == OURS),
        *(arm for arm in qemu_arms(THROTTLED_LIMIT_S, THROTTLED_LIMIT_S) if arm.name == CONVERGE),
    ]
    claims = [innocent_claim(max(5, runs))]
    for rate in rates:
        workload = Workload(image.kernel, image.initrd, writes_per_s=rate, connections=1, contended=False)
        session = Session(workload, "1gbit", Console(stderr=True))
        session.play_in_turn(arms, runs)
        claims += claims_of(session.document())
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
