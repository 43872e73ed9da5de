"""outboard heat: where a VM touches its memory, over address and time."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

import click
import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.cli.attach import memory_options, open_memory
from outboard.cli.output import output_option, print_json, size_text
from outboard.cli.plots import html_page, picture_options, steps
from outboard.cli.sampled import slowdown_option, unit_of
from outboard.pages import PAGE_SIZE
from outboard.trace.accesses import open_access_trace
from outboard.trace.sampling import MOST, sample

_SHADES = " ░▒▓█"
_CELLS = 64
_LEFT, _TOP, _WIDTH, _ROW = 60, 46, 640, 12
_AT_ONCE = 256
_BLUE = (31, 111, 235)


class HeatRow(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.heat.v1"):
    """One interval: which share of the sampled pages was touched, in each of as many equal parts of the memory."""

    vm: str
    elapsed: float
    interval: float
    sampled_pages: int
    touched: float
    cells: list[float]


def _svg(name: str, rows: list[HeatRow], memory: int) -> str:
    """Time runs down, addresses to the right; the darker, the more of the part was touched."""
    width = _WIDTH / _CELLS
    bottom = _TOP + _ROW * len(rows)
    parts = [f'<text class="title" x="{_LEFT}" y="24">Pages of {escape(name)} touched in each interval</text>']
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index
        for cell, share in enumerate(row.cells):
            if share > 0:
                colour = "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in _BLUE)
                parts.append(
                    f'<rect x="{_LEFT + cell * width:.1f}" y="{y}" width="{width + 0.2:.1f}" height="{_ROW}" '
                    f'fill="{colour}"/>'
                )
        if index % 5 == 4:
            parts.append(f'<text x="{_LEFT - 8}" y="{y + _ROW}" text-anchor="end">{row.elapsed:.0f} s</text>')
    parts.append(f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{bottom - _TOP}" class="frame"/>')
    for size in steps(float(memory)):
        x = _LEFT + size / memory * _WIDTH
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{size_text(size)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 40} {bottom + 36}" '
        f'width="{_LEFT + _WIDTH + 40}" height="{bottom + 36}" role="img" '
        f'aria-label="Heat map of {escape(name, quote=True)}">'
        "<style>text{font:13px sans-serif;fill:#1b1f24}.title{font-size:15px;font-weight:600}"
        ".frame{fill:none;stroke:#1b1f24}</style>"
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def _shares(pages: NDArray[np.int64], touched: NDArray[np.int64], of: int) -> list[float]:
    """The share of ``pages`` that was touched, by part of the memory; 0 where none is sampled."""
    edges = np.linspace(0, of, _CELLS + 1)
    there, found = np.histogram(pages, edges)[0], np.histogram(touched, edges)[0]
    shares: list[float] = np.round(found / np.maximum(1, there), 4).tolist()
    return shares


@click.command(epilog="Example: outboard heat web --duration 30 --svg heat.svg")
@memory_options
@click.option("--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, help="Seconds.")
@click.option("--duration", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Seconds.")
@slowdown_option
@picture_options
@output_option("table", "ndjson")
def heat(
    vm: str | None,
    qmp: Path | None,
    pid: int | None,
    interval: float,
    duration: float,
    slowdown: float,
    svg: Path | None,
    html: Path | None,
    output: str,
) -> None:
    """Show which parts of its memory the VM touches: a line for each interval, addresses to the right.

    A sample of pages is traced, the smaller the less the VM may lose and the shorter the interval. The VM runs on.
    """
    rows: list[HeatRow] = []
    with open_memory(vm, qmp, pid) as guest, open_access_trace(guest) as trace:
        # All of them may be touched in each interval, and each touch costs.
        most = max(_CELLS, int(interval * slowdown / 100 / trace.trap_s))
        pages = sample(guest.pages, unit_of(guest), min(most, MOST))
        memory = guest.pages * PAGE_SIZE
        if output == "table":
            click.echo(f"{guest.name}: {size_text(memory)}, {len(pages)} sampled pages, {trace.backend}")
        began = then = time.monotonic()
        armed: NDArray[np.bool_] = np.zeros(len(pages), dtype=np.bool_)
        while then - began < duration:
            # A few at a time: whoever touches them all at once shall not stand still.
            due = pages[~armed]
            for first in range(0, len(due), _AT_ONCE):
                now_armed, _ = trace.arm_each(due[first : first + _AT_ONCE])
                armed[np.searchsorted(pages, now_armed)] = True
            time.sleep(max(0.0, then + interval - time.monotonic()))
            touched = np.sort(trace.collect()["page"])
            armed[np.searchsorted(pages, touched)] = False
            now = time.monotonic()
            rows.append(
                HeatRow(
                    guest.name,
                    now - began,
                    now - then,
                    len(pages),
                    len(touched) / len(pages),
                    _shares(pages, touched, guest.pages),
                )
            )
            then = now
            if output == "ndjson":
                print_json(rows[-1])
            else:
                shades = "".join(
                    _SHADES[min(len(_SHADES) - 1, round(share * (len(_SHADES) - 1) + 0.49))] for share in rows[-1].cells
                )
                click.echo(f"{now - began:7.1f} s │{shades}│ {rows[-1].touched:6.1%}")
    if svg is not None:
        svg.write_text(_svg(guest.name, rows, memory))
    if html is not None:
        html.write_text(html_page(f"Heat map of {guest.name}", _svg(guest.name, rows, memory), []))
