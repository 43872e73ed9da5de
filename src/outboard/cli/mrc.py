"""outboard mrc: how often a VM's memory would miss if it were smaller, while the VM runs."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from outboard.cli.attach import memory_options, open_memory
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.cli.plots import html_page, picture_options, rate_text, svg_chart, text_chart
from outboard.cli.sampled import Sampled, sampled, slowdown_option
from outboard.trace.curve import MissRateCurve

_SIZES = 64
_ROWS = 16
_BEYOND = 1.25
"""How far the picture goes beyond the largest size that there is evidence for."""


class Point(msgspec.Struct, frozen=True):
    """An LRU memory of ``bytes``: its misses per second, their 90 % band, and per access where that rate is given."""

    bytes: int
    misses_per_s: float
    low: float
    high: float
    ratio: float | None


class Curve(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.mrc.v1"):
    """The curve over ``seconds``; beyond ``horizon`` bytes there is no evidence, and the last rate is repeated."""

    vm: str
    seconds: float
    horizon: int
    spans: int
    sampled_pages: int
    backend: str
    points: list[Point]


def _sizes(one: Sampled) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    total = one.guest.pages // one.unit
    most = min(total, max(_SIZES, one.sampler.horizon() * _BEYOND))
    return np.linspace(0, most, _SIZES + 1)[1:]


def _report(one: Sampled, found: MissRateCurve, access_rate: float | None) -> Curve:
    ratios = [None] * len(found.sizes) if access_rate is None else found.ratio(access_rate).tolist()
    points = [
        Point(round(size * one.unit_bytes), *rates)
        for size, *rates in zip(
            found.sizes.tolist(), found.misses.tolist(), found.low.tolist(), found.high.tolist(), ratios, strict=True
        )
    ]
    return Curve(
        one.guest.name,
        found.seconds,
        round(found.horizon * one.unit_bytes),
        found.spans,
        one.sampler.statistics().sampled,
        one.trace.backend,
        points,
    )


def _words(report: Curve) -> str:
    return (
        f"{report.vm}: {report.seconds:.0f} s, {report.spans} accesses traced on {report.sampled_pages} sampled pages; "
        f"{size_text(report.horizon)} touched"
    )


def _drawing(report: Curve, columns: int) -> Group:
    sizes = np.array([point.bytes for point in report.points], dtype=np.float64)
    rates = np.array([point.misses_per_s for point in report.points])
    return Group(
        Text(_words(report)),
        Text("misses/s against memory"),
        Text(text_chart(sizes, rates, max(20, columns - 18), _ROWS)),
    )


def _picture(report: Curve) -> str:
    columns = zip(*((p.bytes, p.misses_per_s, p.low, p.high) for p in report.points), strict=True)
    sizes, rates, low, high = (np.array(column, dtype=np.float64) for column in columns)
    return svg_chart(f"Miss-rate curve of {report.vm}", sizes, rates, low, high, "memory, with 90 % confidence")


@click.command(epilog="Example: outboard mrc web --duration 30 --svg web.svg")
@memory_options
@click.option("--duration", type=click.FloatRange(1), default=10.0, show_default=True, help="Seconds.")
@click.option("--interval", type=click.FloatRange(0.5), default=5.0, show_default=True, help="Of --live and ndjson.")
@click.option("--live", is_flag=True, help="Draw the curve again in each interval.")
@click.option("--access-rate", type=click.FloatRange(0, min_open=True), help="Accesses/s, if known: adds the ratio.")
@slowdown_option
@picture_options
@output_option("table", "json", "ndjson")
def mrc(
    vm: str | None,
    qmp: Path | None,
    pid: int | None,
    duration: float,
    interval: float,
    live: bool,
    access_rate: float | None,
    slowdown: float,
    svg: Path | None,
    html: Path | None,
    output: str,
) -> None:
    """Show how often an LRU memory of each size would miss, from a sample of pages. The VM runs on.

    With -o ndjson there is one curve for each interval, of that interval alone; all else shows the whole time. The
    ratio of misses to accesses needs the rate of accesses, which cannot be seen from outside.
    """
    console = Console()
    with open_memory(vm, qmp, pid) as guest, sampled(guest, slowdown / 100) as one:
        left = duration
        with Live(console=console, auto_refresh=False, transient=True) as screen:
            while left > 0:
                left -= one.follow(min(left, interval) if live or output == "ndjson" else left)
                if output == "ndjson":
                    print_json(_report(one, one.sampler.cut(_sizes(one)), access_rate))
                elif live and left > 0:
                    report = _report(one, one.sampler.curve(_sizes(one)), access_rate)
                    screen.update(_drawing(report, console.width), refresh=True)
        report = _report(one, one.sampler.curve(_sizes(one)), access_rate)
    if output == "json":
        print_json(report)
    elif output == "table":
        console.print(_drawing(report, console.width))
        rows = [
            [
                size_text(point.bytes),
                rate_text(point.misses_per_s),
                f"{rate_text(point.low)} to {rate_text(point.high)}",
                "" if point.ratio is None else f"{point.ratio:.3f}",
            ]
            for point in report.points[_SIZES // 8 - 1 :: _SIZES // 8]
        ]
        print_table(["memory", "misses/s", "90 %", "" if access_rate is None else "ratio"], rows, empty="")
    if svg is not None:
        svg.write_text(_picture(report))
    if html is not None:
        html.write_text(html_page(f"Miss-rate curve of {report.vm}", _picture(report), [_words(report)]))
