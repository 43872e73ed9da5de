"""outboard wss: how much memory a VM touches within a time."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import numpy as np

from outboard.cli.attach import memory_options, open_memory
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.cli.sampled import sampled, slowdown_option

_WINDOWS = (0.01, 0.1, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class WorkingSet(msgspec.Struct, frozen=True):
    """What is touched within ``window`` seconds on average, in bytes."""

    window: float
    bytes: int


class WorkingSets(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.wss.v1"):
    """The working sets seen in ``seconds``: of windows up to half of that."""

    vm: str
    seconds: float
    memory: int
    backend: str
    working_sets: list[WorkingSet]


@click.command(epilog="Example: outboard wss web --duration 60")
@memory_options
@click.option("--duration", type=click.FloatRange(1), default=20.0, show_default=True, help="Seconds.")
@slowdown_option
@output_option("table", "json")
def wss(vm: str | None, qmp: Path | None, pid: int | None, duration: float, slowdown: float, output: str) -> None:
    """Show how much memory the VM touches within a hundredth of a second, a second, ten, on average.

    A window is shown if it is no longer than half of the duration. The VM runs on.
    """
    with open_memory(vm, qmp, pid) as guest, sampled(guest, slowdown / 100) as one:
        seconds = one.follow(duration)
        windows = np.array([window for window in _WINDOWS if window <= duration / 2])
        pages = one.sampler.working_set(windows)
        found = WorkingSets(
            guest.name,
            seconds,
            guest.pages // one.unit * one.unit_bytes,
            one.trace.backend,
            [
                WorkingSet(window, round(size * one.unit_bytes))
                for window, size in zip(windows.tolist(), pages.tolist(), strict=True)
                if size == size  # a guest that hardly ran tells nothing of long windows
            ],
        )
    if output == "json":
        print_json(found)
        return
    click.echo(f"{found.vm}: {size_text(found.memory)}, watched for {found.seconds:.0f} s")
    rows = [
        [f"{one.window:g} s", size_text(one.bytes), f"{one.bytes / found.memory:.1%}"] for one in found.working_sets
    ]
    print_table(["touched within", "memory", "share"], rows, empty="the VM did not run")
