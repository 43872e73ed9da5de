"""Pictures of a curve: in the terminal out of braille dots, and as SVG.

The rate axis is logarithmic: what matters in a miss-rate curve spans decades.
"""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from outboard.cli.output import C, size_text

Floats = NDArray[np.float64]

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character, by row and column."""

_LEFT, _TOP, _WIDTH, _HEIGHT = 76, 46, 620, 300
_STYLE = (
    "text{font:13px sans-serif;fill:#1b1f24}.title{font-size:15px;font-weight:600}.grid{stroke:#d8dee4}"
    ".axis{stroke:#1b1f24;stroke-width:1.2}.curve{fill:none;stroke:#1f6feb;stroke-width:2}.band{fill:#1f6feb;"
    "fill-opacity:.18}"
)


def _in_a_directory(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a place that will not do before the measurement, not after it."""
    if value is not None and (value.is_dir() or not os.access(value.parent, os.W_OK)):
        raise click.BadParameter(f"{value} cannot be written: give a file in a directory that is there")
    return value


def picture_options(command: C) -> C:
    """The options ``--svg`` and ``--html``."""
    for name, words in (("--html", "Write a page with the picture."), ("--svg", "Draw the picture into this file.")):
        option = click.option(name, type=click.Path(path_type=Path), callback=_in_a_directory, help=words)
        command = option(command)
    return command


def decades(values: Floats) -> tuple[int, int]:
    """The powers of ten between which positive ``values`` lie, four decades at most; 0 and 1 where there are none."""
    positive = values[values > 0]
    if not positive.size:
        return 0, 1
    high = math.ceil(math.log10(float(positive.max())) + 1e-9)
    low = math.floor(math.log10(float(positive.min())))
    return max(low, high - 4), max(high, low + 1)


def _heights(values: Floats, low: int, high: int) -> Floats:
    logs = np.log10(np.maximum(values, 10.0**low))
    shares: Floats = np.clip((logs - low) / (high - low), 0, 1)
    return shares


def rate_text(rate: float) -> str:
    """A rate for people: ``12k``."""
    for unit in ("", "k", "M"):
        if rate < 1000:
            return f"{rate:.3g}{unit}"
        rate /= 1000
    return f"{rate:.3g}G"


def steps(most: float, about: int = 5) -> list[float]:
    """Round sizes from 0 to ``most`` bytes, 1, 2 or 5 times a power of ten apart."""
    if most <= 0:
        return [0.0]
    raw = most / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [step * index for index in range(int(most / step + 1e-9) + 1)]


def text_chart(sizes: Floats, rates: Floats, columns: int, rows: int) -> str:
    """A curve in braille dots; ``sizes`` in bytes, ascending, from the first to the last across."""
    low, high = decades(rates)
    cells = np.zeros((rows, columns), dtype=np.int64)
    across = np.linspace(0, sizes[-1], columns * 2)
    down = (1 - _heights(np.interp(across, sizes, rates), low, high)) * (rows * 4 - 1)
    before = int(down[0])
    for x, y in enumerate(down.round().astype(int).tolist()):
        for between in range(min(before, y), max(before, y) + 1):
            cells[between // 4, x // 2] |= _DOTS[between % 4][x % 2]
        before = y
    lines = []
    labels = {round((high - power) / (high - low) * (rows - 1)): power for power in range(low, high + 1)}
    for row in range(rows):
        label = rate_text(10.0 ** labels[row]) if row in labels else ""
        lines.append(f"{label:>6} │" + "".join(chr(0x2800 + int(cell)) for cell in cells[row]))
    ruler = [" "] * (columns + 8)
    for size in steps(float(sizes[-1])):
        text = size_text(size)
        at = round(size / float(sizes[-1]) * (columns - 1))
        if at + len(text) <= len(ruler):
            ruler[at : at + len(text)] = text
    return "\n".join([*lines, "       └" + "─" * columns, "        " + "".join(ruler).rstrip()])


def svg_chart(title: str, sizes: Floats, rates: Floats, low: Floats, high: Floats, right: str) -> str:
    """A curve with its band; ``sizes`` in bytes; ``right`` says below what the picture is of."""
    bottom, top = decades(np.concatenate((rates, high)))
    x = _LEFT + sizes / float(sizes[-1]) * _WIDTH

    def y_of(values: Floats) -> Floats:
        return _TOP + (1 - _heights(values, bottom, top)) * _HEIGHT

    def points(values: Floats, *, back: bool = False) -> str:
        pairs = [f"{one:.1f},{other:.1f}" for one, other in zip(x, y_of(values), strict=True)]
        return " ".join(reversed(pairs) if back else pairs)

    parts = [f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>']
    for power in range(bottom, top + 1):
        y = float(y_of(np.array([10.0**power]))[0])
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}"/>')
        label = rate_text(10.0**power)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for size in steps(float(sizes[-1])):
        at = _LEFT + size / float(sizes[-1]) * _WIDTH
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_TOP + _HEIGHT}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{size_text(size)}</text>')
    parts += [
        f'<polygon class="band" points="{points(high)} {points(low, back=True)}"/>',
        f'<polyline class="curve" points="{points(rates)}"/>',
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{_TOP + _HEIGHT}H{_LEFT + _WIDTH}"/>',
        f'<text x="16" y="{_TOP + _HEIGHT // 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {_TOP + _HEIGHT // 2})">misses per second</text>',
        f'<text x="{_LEFT + _WIDTH // 2}" y="{_TOP + _HEIGHT + 40}" text-anchor="middle">{escape(right)}</text>',
    ]
    width, height = _LEFT + _WIDTH + 30, _TOP + _HEIGHT + 56
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"
    )


def html_page(title: str, svg: str, words: list[str]) -> str:
    """A page of its own around a picture."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in words)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>body{{font:15px sans-serif;max-width:760px;margin:2em auto}}"
        f"svg{{max-width:100%;height:auto}}</style></head><body>{svg}{lines}</body></html>\n"
    )
