"""The session's table on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .document import Arm, Document
from .words import COLUMNS, extremes, median


def _verdict(arm: Arm) -> Text:
    return Text("yes", style="green") if arm.verified else Text("NO", style="bold red")


def table(document: Document) -> Table:
    """One row an arm; where an arm ran more than once, least and most stand below the median."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("arm", no_wrap=True)
    for _, heading, unit, _ in COLUMNS:
        result.add_column(f"{heading}\n{unit}", justify="right")
    result.add_column("verified\n")
    for arm in document.arms:
        style = "bold" if arm.arm.startswith("outboard-") else ""
        cells = []
        for figure, _, _, write in COLUMNS:
            cell = Text(median(arm, figure, write), style=style)
            between = extremes(arm, figure, write)
            if between:
                cell.append(f"\n{between}", style="dim not bold")
            cells.append(cell)
        result.add_row(Text(arm.name, style=style), *cells, _verdict(arm))
    return result


def show(document: Document, console: Console) -> None:
    """Print the table and what it needs to be understood."""
    settings = document.settings
    console.print(table(document))
    console.print(
        f"One of two VMs of {settings.memory} that share a core leaves it over a link of {settings.shape}; "
        f"{settings.writes_per_s:,} page writes/s over {settings.working_set_mib} MiB inside. "
        f"ops: memcached answers of both VMs; lost: within {settings.window_s:.0f} s of the command.",
        style="dim",
    )
    for arm in document.arms:
        for note in arm.notes:
            console.print(f"{arm.name}: {note}", style="dim")
