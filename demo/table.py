"""The session's table on the terminal: a column for each arm, a line for each figure."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .document import Arm, Document
from .words import COLUMNS, extremes, median

_LABEL, _COLUMN = 26, 15
"""Columns of the terminal that the labels and an arm take."""


def _heading(arm: Arm) -> str:
    product, _, way = arm.arm.partition("-")
    way = way.replace("post-copy-preempt", "post-copy-\npreempt")
    return "\n".join([f"{product}-", way, *([] if arm.churned else ["(unchurned)"])])


def _cell(arm: Arm, figure: str) -> Text:
    write = next(write for name, _, _, write in COLUMNS if name == figure)
    cell = Text(median(arm, figure, write), style="bold" if arm.arm.startswith("outboard-") else "")
    between = extremes(arm, figure, write)
    if between:
        cell.append(f"\n{between}", style="dim not bold")
    return cell


def table(arms: list[Arm]) -> Table:
    """The arms side by side; where one ran more than once, least and most stand below its median."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("", no_wrap=True)
    for arm in arms:
        result.add_column(_heading(arm), justify="right")
    for figure, heading, unit, _ in COLUMNS:
        result.add_row(f"{heading}{f', {unit}' if unit else ''}", *[_cell(arm, figure) for arm in arms])
    verdicts = [Text("yes", style="green") if arm.verified else Text("NO", style="bold red") for arm in arms]
    result.add_row("verified", *verdicts)
    return result


def show(document: Document, console: Console) -> None:
    """Print the table, in as many pieces as the terminal is too narrow for, and what it takes to understand it."""
    settings = document.settings
    fit = max((console.width - _LABEL) // _COLUMN, 1) if console.is_terminal else len(document.arms)
    if not console.is_terminal:
        console.width = max(console.width, _LABEL + _COLUMN * fit)
    for first in range(0, len(document.arms), fit):
        console.print(table(document.arms[first : first + fit]))
    console.print(
        f"One of two VMs of {settings.memory} that share a core leaves it; the link: {settings.shape}; "
        f"{settings.writes_per_s:,} page writes/s over {settings.working_set_mib} MiB inside. ops: memcached answers "
        f"of both VMs; lost: within {settings.window_s:.0f} s of the command.",
        style="dim",
    )
    for arm in document.arms:
        for note in arm.notes:
            console.print(f"{arm.name}: {note}", style="dim")
