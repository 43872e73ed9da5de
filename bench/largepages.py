"""script/bench largepages: guests in large pages, before a migration and after it.

Two parts. The demo's VM and job over 1 Gbit/s, in small pages, in large mappings of ordinary shared memory, and in huge
pages: large mappings at both ends, total time, and the client's operations before and after. And the memory's speed by
itself, where it can be told apart: a process reads random words of its memory, all of it then arrives as a migration
would bring it, and it reads again. Under TCG a guest's own speed hardly shows how its memory is mapped.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from demo.document import Document
from demo.hosts import ROOT
from demo.outboard_arms import outboard_arms
from demo.scene import Workload
from demo.session import LIMIT_S, THROTTLED_LIMIT_S, Session
from guest.build import build
from outboard.pager.arriving_large import arriving_kind
from outboard.pager.rebuilding import Rebuilding
from outboard.pages import LARGE, PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.vmm.large_pages import large_mappings
from outboard.vmm.process import attach_process

from .claims import Claim, claim, publish
from .largemem import large_pages
from .sessions import arm_of
from .touchers import Toucher

METHODS = ("outboard-pre-copy", "outboard-enlightened")
_MIB = 512
_GIB_IN_LARGE = 512


def _session(page_size: str, runs: int) -> Document:
    image = build(ROOT / ".build/guest")
    # A moderate writer: pre-copy of it converges by itself.
    workload = Workload(
        image.kernel, image.initrd, page_size=page_size, writes_per_s=2000, connections=1, contended=False
    )
    session = Session(workload, "1gbit", Console(stderr=True))
    arms = [arm for arm in outboard_arms(max(LIMIT_S, THROTTLED_LIMIT_S)) if arm.name in METHODS]
    session.play_in_turn(arms, runs)
    return session.document()


def vm_claims(kind: str, large: Document, small: Document) -> list[Claim]:
    """What a VM in large pages must reach; ``small`` is the same in pages of 4 KiB."""
    claims = []
    for method in METHODS:
        runs = [run for run in large.runs if run.arm == method and run.outcome.summary]
        kept = [
            (run.outcome.summary["large_mappings_after"] or 0) / max(1, run.outcome.summary["large_mappings_before"])
            for run in runs
            if run.outcome.summary is not None
        ]
        name = f"{kind}, {method.removeprefix('outboard-')}"
        claims.append(
            claim(f"{name}: large mappings kept", min(kept, default=None), 0.99, "", len(runs), at_least=True)
        )
        ours, peer = arm_of(large, method), arm_of(small, method)
        claims.append(
            claim(
                f"{name}: total time",
                None if ours is None else ours.total_s,
                1.05,
                "s",
                len(runs),
                peer=None if peer is None else peer.total_s,
                against="small pages",
            )
        )
        before = [sum(run.ops_before.values()) for run in runs if run.ops_after is not None]
        after = [sum(run.ops_after.values()) for run in runs if run.ops_after is not None]
        claims.append(
            claim(
                f"{name}: operations after",
                statistics.median(after) if after else None,
                0.97,
                "/s",
                len(runs),
                peer=statistics.median(before) if before else None,
                against="before",
                at_least=True,
            )
        )
    return claims


def _arrive(toucher: Toucher, directory: Path, *, rebuilt: bool) -> float:
    """Have all of its memory arrive as a migration would bring it; the share of large mappings that it has again."""
    with attach_process(toucher.pid) as guest:
        before = large_mappings(guest)
        content = np.empty(guest.pages * PAGE_SIZE, dtype=np.uint8)
        guest.memory.read_into(0, content.data)
        journal = Path(tempfile.mkdtemp(dir=directory))
        memory = arriving_kind(guest)(guest, journal)
        rebuilding = Rebuilding(memory, journal)
        if rebuilt:
            rebuilding.want(before)
        at_once = max(64, memory.unit)
        for first in range(0, guest.pages, at_once):
            part = content[first * PAGE_SIZE : (first + at_once) * PAGE_SIZE]
            zero = zero_pages(part)
            full = np.ascontiguousarray(part.reshape(-1, PAGE_SIZE)[~zero].reshape(-1))
            memory.place(np.array([[first, zero.size]]), zero, full)
        memory.run()
        rebuilding.finish()
        memory.release()
        return rebuilding.count() * LARGE / max(1, len(before))


def memory_claims(kind: str, runs: int, console: Console) -> list[Claim]:
    """How fast a process reads its memory, before and after it has arrived."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-bench-"))
    toucher = Toucher(directory, _MIB, kind)
    try:
        before = [toucher.read_ns() for _ in range(runs)]
        kept = _arrive(toucher, directory, rebuilt=True)
        after = [toucher.read_ns() for _ in range(runs)]
        if kind == "thp":
            _arrive(toucher, directory, rebuilt=False)
            console.print(
                f"in small mappings {statistics.median(toucher.read_ns() for _ in range(runs)):.1f} ns a word"
            )
    finally:
        toucher.close()
        shutil.rmtree(directory)
    ours, peer, spread = statistics.median(after), statistics.median(before), (min(after), max(after))
    return [
        claim(f"process, {kind}: large mappings kept", kept, 0.99, "", 1, at_least=True),
        claim(f"process, {kind}: read", ours, 1.03, "ns", runs, peer=peer, against="before", spread=spread),
    ]


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--vms/--no-vms", default=True, show_default=True, help="The part with VMs.")
def main(file: Path | None, runs: int, vms: bool) -> None:
    """Judge migrations of guests in large pages."""
    console = Console(stderr=True)
    claims: list[Claim] = []
    with large_pages(_MIB // 2):
        for kind in ("thp", "hugetlb"):
            claims += memory_claims(kind, max(5, runs), console)
    if vms:
        small = _session("4KiB", runs)
        for kind, page_size, huge in (("large mappings", "4KiB", 0), ("huge pages", "2MiB", 2 * _GIB_IN_LARGE)):
            with large_pages(huge):
                claims += vm_claims(kind, _session(page_size, runs), small)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
