"""``python -m demo``: play the arms, print the table, write the report."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from guest.build import build

from .document import save
from .hosts import ROOT, SHAPES, TestbedError, sweep
from .page import render
from .scene import Workload
from .session import Session, all_arms
from .table import show
from .vms import EVICTED

QUICK = ("outboard-enlightened", "qemu-post-copy-preempt", "qemu-pre-copy")


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.command()
@click.option("--quick", is_flag=True, help=f"Only {', '.join(QUICK)}, once each.")
@click.option("--arm", "chosen", multiple=True, metavar="NAME", help="Only this arm; repeatable.")
@click.option("--runs", default=1, show_default=True, help="Runs of each arm; the report gives medians.")
@click.option("--unchurned", is_flag=True, help="Each arm also on a guest whose free memory is still zero.")
@click.option("--link", "shape", type=click.Choice(list(SHAPES)), default="1gbit", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures and recordings here.")
@click.option("--report", type=click.Path(path_type=Path), default=ROOT / "demo/report.html", help="The page.")
def main(
    quick: bool, chosen: tuple[str, ...], runs: int, unchurned: bool, shape: str, json_file: Path | None, report: Path
) -> None:
    """Evict a busy VM from a contended core, by Outboard and by QEMU itself, and compare.

    Exit status: 0 when every arm ran and its VM was verified, else 1.
    """
    signal.signal(signal.SIGTERM, _terminate)
    console = Console(stderr=True)
    arms = {arm.name: arm for arm in all_arms()}
    names = chosen or (QUICK if quick else tuple(arms))
    for name in names:
        if name not in arms:
            raise click.BadParameter(f"{name} is none of {', '.join(arms)}", param_hint="--arm")
    for left in sweep():
        console.print(f"[dim]removed what {left} had left behind[/dim]")
    image = build(ROOT / ".build/guest")
    session = Session(Workload(image.kernel, image.initrd), shape, console)
    session.play_in_turn([arms[name] for name in names], 1 if quick else runs, unchurned=unchurned)
    try:
        document = session.document()
    except TestbedError as error:
        sys.exit(f"demo: {error}")
    show(document, Console())
    report.write_text(render(document, EVICTED.name))
    console.print(f"report: {report}")
    if json_file is not None:
        save(document, json_file)
    sys.exit(1 if session.failures or not all(arm.verified for arm in document.arms) else 0)


if __name__ == "__main__":
    main()
