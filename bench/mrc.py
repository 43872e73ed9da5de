"""script/bench mrc: the online miss-rate curve against an exact LRU stack on the very same accesses.

A target touches pages of its shared memory in a known order, without a sleep; Outboard traces it from outside as it
would any process. The accesses that fell into the window, and all before them, go through Mattson's stack; the curve
is judged at 64 sizes. memcached and redis-server are judged under load too; bench.servers knows the truth of them. Then
the trace is switched off and on in turn: the slowdown is what the target's rate of touches loses, by the clock and by
its own processor time (which other work on the machine does not disturb).
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console

from outboard.trace.accesses import AccessTrace, MessagesTrace, PageTablesTrace
from outboard.trace.sampling import Budget, Sampler, sample
from outboard.vmm.process import attach_process

from .claims import Claim, claim, publish
from .patterns import PATTERNS
from .servers import SERVERS, ServerTarget
from .targets import KnownTarget, Mark, Target

_SIZES = 64
_WARM_S = 3.0
_SLICE_S, _SETTLE_S, _PAIRS = 0.3, 0.1, 20
_BACKENDS: dict[str, type[AccessTrace]] = {kind.backend: kind for kind in (PageTablesTrace, MessagesTrace)}


@dataclass(frozen=True, slots=True)
class Run:
    """One run: mean absolute error of the ratio, mean relative error of misses/s (where the ratio is at least 0.02),
    slowdown by clock and by processor time, traps and touches per second, state in bytes, share of sizes at which the
    band holds the truth, and the tracer's own processor time by the clock's."""

    ratio_error: float
    rate_error: float
    slowdown: float
    cpu_slowdown: float
    traps: float
    touches: float
    state: int
    covered: float
    tracer: float


def _rates(before: Mark, after: Mark) -> tuple[float, float]:
    touches = after.touches - before.touches
    return touches / (after.clock - before.clock), touches / (after.cpu - before.cpu)


def _trace(sampler: Sampler, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(sampler.step())


def _slowdowns(target: Target, sampler: Sampler, pairs: int) -> tuple[float, float]:
    """Medians over pairs of slices, traced and not traced; short ones, in which the rest of the machine does alike."""
    found = []
    for _ in range(pairs):
        _trace(sampler, _SETTLE_S)
        marks = [target.mark()]
        _trace(sampler, _SLICE_S)
        marks.append(target.mark())
        # What is armed now is touched soon.
        time.sleep(_SETTLE_S)
        marks.append(target.mark())
        time.sleep(_SLICE_S)
        marks.append(target.mark())
        with_it, without = _rates(marks[0], marks[1]), _rates(marks[2], marks[3])
        found.append([1 - one / other for one, other in zip(with_it, without, strict=True)])
    by_clock, by_cpu = np.median(found, axis=0)
    return float(by_clock), float(by_cpu)


def run(target: Target, rng: np.random.Generator, backend: type[AccessTrace], *, window: float, slowdown: float) -> Run:
    """Trace a target for ``window`` seconds and judge the curve."""
    with attach_process(target.pid) as guest:
        time.sleep(_WARM_S)
        with backend(guest) as trace:
            sampler = Sampler(
                trace,
                sample(guest.pages),
                guest.pages,
                Budget(backend.trap_s, slowdown),
                rng,
                time.monotonic_ns,
            )
            began, spent = target.mark(), time.process_time()
            _trace(sampler, window)
            spent = time.process_time() - spent
            ended = target.mark()
            sizes = np.linspace(0, target.touched, _SIZES + 1)[1:]
            curve, told = sampler.curve(sizes), sampler.statistics()
            state = told.state + trace.statistics().state
            costs = _slowdowns(target, sampler, _PAIRS)
    seconds = ended.clock - began.clock
    touches = ended.touches - began.touches
    truth = target.misses(began, ended, sizes)
    ratio = truth / touches
    matter = ratio >= 0.02
    return Run(
        float(np.mean(np.abs(curve.ratio(touches / seconds) - ratio))),
        float(np.mean(np.abs(curve.misses * seconds - truth)[matter] / truth[matter])),
        *costs,
        told.traps / seconds,
        touches / seconds,
        state,
        float(np.mean((curve.low * seconds <= truth) & (truth <= curve.high * seconds))),
        spent / seconds,
    )


def claims_of(pattern: str, runs: list[Run]) -> list[Claim]:
    """What the curve must reach."""

    def one(name: str, values: list[float], bar: float, unit: str = "") -> Claim:
        return claim(f"{pattern}: {name}", median(values), bar, unit, len(values), spread=(min(values), max(values)))

    return [
        one("error of the ratio", [each.ratio_error for each in runs], 0.01),
        one("error of misses/s", [each.rate_error for each in runs], 0.1),
        one("slowdown, clock", [each.slowdown for each in runs], 0.02),
        one("slowdown, processor time", [each.cpu_slowdown for each in runs], 0.02),
        one("state", [each.state / 1024 for each in runs], 1024, "KiB"),
    ]


def _target(pattern: str, seed: int, rng: np.random.Generator, pages: int, work: int) -> AbstractContextManager[Target]:
    if pattern in SERVERS:
        return ServerTarget(pattern, seed)
    return KnownTarget(PATTERNS[pattern](rng, pages, 1 << 23), pages, work)


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option(
    "--pattern", "patterns", type=click.Choice([*PATTERNS, *SERVERS]), multiple=True, help="All if not given."
)
@click.option("--seeds", default=10, show_default=True)
@click.option("--window", default=60.0, show_default=True, help="Seconds.")
@click.option("--pages", default=16_384, show_default=True)
@click.option("--work", default=2_500, show_default=True, help="Steps after each touch; 2500 are about 4 us.")
@click.option("--slowdown", default=0.02, show_default=True, help="The budget.")
@click.option("--backend", type=click.Choice(list(_BACKENDS)), default="page-tables", show_default=True)
def main(
    file: Path | None,
    patterns: tuple[str, ...],
    seeds: int,
    window: float,
    pages: int,
    work: int,
    slowdown: float,
    backend: str,
) -> None:
    """Judge the miss-rate curve."""
    console = Console()
    claims = []
    for pattern in patterns or (*PATTERNS, *SERVERS):
        runs = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            with _target(pattern, seed, rng, pages, work) as target:
                found = run(target, rng, _BACKENDS[backend], window=window, slowdown=slowdown)
            runs.append(found)
            console.print(
                f"{pattern} {seed}: ratio ±{found.ratio_error:.4f}, misses/s ±{found.rate_error:.1%}, "
                f"slowdown {found.slowdown:.2%} (processor {found.cpu_slowdown:.2%}), {found.traps:.0f} traps/s of "
                f"{found.touches:.0f} touches/s, band holds {found.covered:.0%}, tracer {found.tracer:.0%}, "
                f"{found.state / 1024:.0f} KiB",
                highlight=False,
            )
        claims += claims_of(pattern, runs)
    publish(claims, file, console)
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
