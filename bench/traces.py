"""script/bench traces: what a write trace costs the writer, by granularity, armed and collected as by a migration.

A process computes and writes to 20,000 random pages a second of 512 MiB. It runs untraced; then its memory is armed
while it runs, and collected twice a second as between rounds. Its work is looked at over the whole time, in windows of
ten milliseconds, and step by step. The peer is the same process untraced in the same run.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import click
from rich.console import Console

from outboard.trace.writes import MessageTrace, PagemapTrace, WriteTrace
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_process

from .claims import Claim, claim, publish
from .largemem import large_pages
from .stallers import Staller, Work, compiled

_MIB, _RATE = 512, 20_000
_SECONDS, _ROUND_S = 5.0, 0.5

_TRACES: dict[str, Callable[[Guest], WriteTrace]] = {
    "pagemap": PagemapTrace,
    "messages": MessageTrace,
    "messages, coarse": lambda guest: MessageTrace(guest, coarse=True),
}
_MAPPINGS = {"4 KiB": "memfd", "large mappings": "thp", "huge pages": "hugetlb"}


def _watched(staller: Staller, trace: Callable[[Guest], WriteTrace] | None) -> tuple[Work, float]:
    """Let it work for a while, traced or not; how it did, and how long arming took in milliseconds."""
    staller.begin()
    took = 0.0
    until = time.monotonic() + _SECONDS
    with attach_process(staller.pid) as guest, nullcontext() if trace is None else trace(guest) as armed:
        if armed is not None:
            took = armed.statistics().armed_ns / 1e6
        while time.monotonic() < until:
            time.sleep(_ROUND_S)
            if armed is not None:
                armed.collect()
        return staller.end(), took


def _measure(program: Path, mapping: str, trace: str, runs: int, console: Console) -> list[Claim]:
    alone: list[Work] = []
    traced: list[Work] = []
    armed: list[float] = []
    staller = Staller(program, _MAPPINGS[mapping], _MIB, _RATE)
    try:
        for _ in range(runs):
            alone.append(_watched(staller, None)[0])
            work, took = _watched(staller, _TRACES[trace])
            traced.append(work)
            armed.append(took)
    finally:
        staller.close()
    what = f"{mapping}, {trace}"
    console.print(f"{what}: armed in {statistics.median(armed):.2f} ms; {alone[0]} alone, {traced[0]} traced")

    def against(name: str, value: Callable[[Work], float], bar: float, unit: str, *, at_least: bool = False) -> Claim:
        ours, peers = [value(work) for work in traced], [value(work) for work in alone]
        spread = (min(ours), max(ours))
        ours_, peer = statistics.median(ours), statistics.median(peers)
        who = "untraced"
        return claim(
            f"{what}: {name}", ours_, bar, unit, runs, peer=peer, against=who, spread=spread, at_least=at_least
        )

    return [
        against("work done", lambda work: work.rate, 0.98, "steps/s", at_least=True),
        against("work in the worst 10 ms, of the median", lambda work: work.worst, 0.9, "", at_least=True),
        against("longest stall", lambda work: work.longest, 1.0, "ms"),
    ]


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
def main(file: Path | None, runs: int) -> None:
    """Judge the write trace's cost by granularity."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-bench-"))
    claims: list[Claim] = []
    try:
        program = compiled(directory)
        with large_pages(_MIB // 2):
            for mapping in _MAPPINGS:
                for trace in _TRACES:
                    if mapping == "4 KiB" or trace != "messages, coarse":
                        claims += _measure(program, mapping, trace, runs, Console(stderr=True))
    finally:
        shutil.rmtree(directory)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
