"""outboard dirty: how fast a VM writes to its memory, live."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from outboard.cli.attach import open_guest
from outboard.cli.output import output_option, print_json, size_text
from outboard.pages import PAGE_SIZE
from outboard.trace.writes import open_write_trace


class DirtyRate(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.dirty.v1"):
    """What was written in one interval."""

    vm: str
    elapsed: float
    pages: int
    pages_per_s: float
    bytes_per_s: float
    backend: str


@click.command(epilog="Example: outboard dirty web --duration 10 -o ndjson")
@click.argument("vm", required=False)
@click.option("--qmp", type=click.Path(path_type=Path), help="A QEMU that Outboard did not start, by its QMP socket.")
@click.option("--pid", type=int, help="A QEMU that Outboard did not start, by its process.")
@click.option("--interval", type=click.FloatRange(0.01, 60), default=1.0, show_default=True, help="Seconds.")
@click.option("--duration", type=click.FloatRange(0.01), help="Seconds; until Ctrl-C when not given.")
@output_option("table", "ndjson")
def dirty(
    vm: str | None, qmp: Path | None, pid: int | None, interval: float, duration: float | None, output: str
) -> None:
    """Show how many different pages the VM writes in each interval. No vCPU is stopped."""
    began = time.monotonic()
    with open_guest(vm, qmp, pid) as guest, open_write_trace(guest) as trace:
        armed = trace.statistics()
        if output == "table":
            traced = size_text(guest.pages * PAGE_SIZE)
            click.echo(f"{guest.name}: {traced} traced by {armed.backend}, armed in {armed.armed_ns / 1e6:.1f} ms")
        then = time.monotonic()
        trace.collect()
        while duration is None or then - began < duration:
            time.sleep(max(0.0, then + interval - time.monotonic()))
            pages = len(trace.collect())
            now = time.monotonic()
            rate = pages / (now - then)
            then = now
            if output == "ndjson":
                print_json(DirtyRate(guest.name, now - began, pages, rate, rate * PAGE_SIZE, armed.backend))
            else:
                click.echo(
                    f"{now - began:7.1f} s  {pages:8d} pages  {rate:9.0f} pages/s  {size_text(rate * PAGE_SIZE)}/s"
                )
