"""script/bench migrate: a migration over a link that is not the limit, by Outboard and by QEMU's fastest ways.

The demo's VM and job, alone on its core and with one connection of the client, over an unshaped link (24 to 28
Gbit/s). What bounds ours is the guest agent's answer before the switch-over, then copying and encrypting at both ends
and filling fresh shared memory, about 1 GB/s on one core.

With ``--arms all`` every way of both plays once more over 1 Gbit/s, and a table sets them side by side.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from demo.document import Document, save
from demo.hosts import ROOT
from demo.outboard_arms import outboard_arms
from demo.qemu_arms import multifd_arm, qemu_arms
from demo.scene import Workload
from demo.session import LIMIT_S, Session, all_arms
from demo.table import show
from guest.build import build

from .claims import Claim, publish
from .sessions import OURS, against, alone

QEMU = ("qemu-pre-copy", "qemu-multifd-2", "qemu-post-copy", "qemu-post-copy-preempt")


def claims_of(document: Document) -> list[Claim]:
    """What a migration over an unlimited link must reach."""
    return [
        against(document, "total time, unlimited link", "total_s", QEMU, 0.35, "s"),
        alone(document, "blackout, unlimited link", "blackout_ms", 35, "ms"),
    ]


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--session", "session_file", type=click.Path(path_type=Path), help="Write the runs' recordings here.")
@click.option("--runs", default=3, show_default=True)
@click.option(
    "--arms", type=click.Choice(["best", "all"]), default="best", show_default=True, help="Which ways are compared."
)
def main(file: Path | None, session_file: Path | None, runs: int, arms: str) -> None:
    """Judge the migration over an unlimited link."""
    image = build(ROOT / ".build/guest")
    workload = Workload(image.kernel, image.initrd, connections=1, contended=False)
    if arms == "all":
        every = Session(workload, "1gbit", Console(stderr=True))
        every.play_in_turn([*all_arms(), multifd_arm(LIMIT_S)], runs)
        show(every.document(), Console())
    session = Session(workload, "unlimited", Console(stderr=True))
    ours = [arm for arm in outboard_arms(LIMIT_S) if arm.name == OURS]
    peers = [arm for arm in [*qemu_arms(LIMIT_S, LIMIT_S), multifd_arm(LIMIT_S)] if arm.name in QEMU]
    session.play_in_turn([*ours, *peers], runs)
    document = session.document()
    if session_file is not None:
        save(document, session_file)
    claims = claims_of(document)
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
