"""script/bench throttle: pre-copy of a VM that writes faster than the link carries, by Outboard and by QEMU.

The demo's VM and job, alone on its core, at 40,000 and 80,000 page writes/s over 256 MiB and 1 Gbit/s. Both throttle:
QEMU's auto-converge all vCPUs, in steps of a tenth; Outboard the vCPUs that write, by its model.
"""

from __future__ import annotations

import sys
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

from .claims import Claim, publish
from .sessions import against

OURS, CONVERGE = "outboard-pre-copy", "qemu-auto-converge"
RATES = (40_000, 80_000)


def claims_of(document: Document) -> list[Claim]:
    """What a throttled pre-copy must reach."""
    rate = f"{document.settings.writes_per_s} writes/s"
    return [
        against(document, f"total time, {rate}", "total_s", CONVERGE, 0.5, "s", our_arm=OURS),
        against(document, f"longest gap, {rate}", "longest_gap_ms", CONVERGE, 0.25, "ms", our_arm=OURS),
    ]


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
    claims: list[Claim] = []
    for rate in rates:
        workload = Workload(image.kernel, image.initrd, writes_per_s=rate, connections=1, contended=False)
        session = Session(workload, "1gbit", Console(stderr=True))
        session.play_in_turn(arms, runs)
        claims += claims_of(session.document())
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
