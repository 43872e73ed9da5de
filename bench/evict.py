"""script/bench evict: the eviction of a busy VM over 1 Gbit/s, by Outboard and by every way of QEMU's.

The demo's own runs: 1 GiB, 40,000 page writes/s over 256 MiB, the guest churned. ``--from FILE`` judges a session that
``script/demo --json FILE`` has written before.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from demo import document as documents
from demo.hosts import ROOT
from demo.outboard_arms import outboard_arms
from demo.qemu_arms import qemu_arms
from demo.scene import Workload
from demo.session import LIMIT_S, THROTTLED_LIMIT_S, Session
from guest.build import build

from .claims import Claim, publish
from .sessions import OURS, against, alone

PREEMPT, CONVERGE = "qemu-post-copy-preempt", "qemu-auto-converge"
QEMU = ("qemu-pre-copy", CONVERGE, "qemu-post-copy", PREEMPT)


def claims_of(document: documents.Document) -> list[Claim]:
    """What the eviction must reach."""
    return [
        against(document, "total time", "total_s", PREEMPT, 0.5, "s"),
        against(document, "total time", "total_s", CONVERGE, 0.15, "s"),
        against(document, "bytes on the link", "bytes", PREEMPT, 0.55, "MB", 1e-6),
        against(document, "longest gap of the guest", "longest_gap_ms", PREEMPT, 0.15, "ms"),
        alone(document, "blackout", "blackout_ms", 35, "ms"),
        alone(document, "blackout, the worst", "blackout_ms", 50, "ms", worst=True),
        alone(document, "remote faults, p50", "fault_p50_us", 150, "us"),
        alone(document, "remote faults, p99", "fault_p99_us", 1000, "us"),
        alone(document, "bulk's share of the link", "link_share", 0.8, "", at_least=True),
        against(document, "client operations lost", "ops_lost", QEMU, 0.4, ""),
    ]


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--from", "session_file", type=click.Path(path_type=Path, exists=True), help="A session of script/demo.")
@click.option("--runs", default=3, show_default=True, help="Runs of QEMU's arms.")
@click.option("--our-runs", default=10, show_default=True, help="Runs of ours: the worst blackout is of ten.")
def main(file: Path | None, session_file: Path | None, runs: int, our_runs: int) -> None:
    """Judge the eviction over 1 Gbit/s."""
    if session_file is not None:
        document = documents.load(session_file)
    else:
        image = build(ROOT / ".build/guest")
        session = Session(Workload(image.kernel, image.initrd), "1gbit", Console(stderr=True))
        ours = [arm for arm in outboard_arms(LIMIT_S) if arm.name == OURS]
        session.play_in_turn([*ours, *qemu_arms(LIMIT_S, THROTTLED_LIMIT_S)], runs)
        session.play_in_turn(ours, our_runs - runs)
        document = session.document()
    claims = claims_of(document)
    publish(claims, file, Console())
    sys.exit(0 if all(claim.met for claim in claims) else 1)


if __name__ == "__main__":
    main()
