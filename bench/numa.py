"""script/bench numa: a process goes to the other node of a host, and its memory follows by each policy.

The host is a guest of two nodes under TCG (guest.host), in which this project runs as it is installed here. The target
touches 256 MiB in a Zipf-distributed order; it is looked at, then put on the other node's processor, and its memory is
moved by the code that ``outboard numa move`` runs. Beside it: address order by the same code, migrate_pages(2), and the
kernel's own NUMA balancing. At the end of each arm the target checks every word that it has. Last, all memory of a QEMU
VM that verifies it goes to and fro.

There is no far memory under TCG: what is measured is which share of the accesses is to the target's own node, not what
that is worth.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

import click
import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from guest.host import build, run
from outboard.numa.policies import POLICIES

from . import numa_vm
from .claims import Claim, claim, publish
from .numa_inside import BALANCING, LONGER, MIGRATE, TO_AND_FRO, VM, Outcome, Setup

ROOT = Path(__file__).parents[1]
_NODES = (896, 640)
_SHARE = 0.9
_LENGTH = 1 << 22
_PROCESSOR = "generic"
"""What compiled loops are compiled for: the guest's processor has fewer instructions than this one."""
_COLOURS = ("#1f6feb", "#1a7f37", "#8250df", "#bc4c00", "#cf222e", "#6e7781", "#0a7ea4", "#bf3989")
_LEFT, _TOP, _WIDTH, _HEIGHT = 60, 46, 620, 300


def _compiled(directory: Path) -> dict[str, str]:
    """The environment of what runs in the guest, whose loops are compiled here once."""
    cache = ROOT / ".build/numba-guest"
    environment = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "NUMBA_CPU_NAME": _PROCESSOR, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", "import bench.numa_inside"],
        env={**os.environ, **environment, "NUMBA_CACHE_DIR": str(cache)},
        cwd=ROOT,
        check=True,
    )
    shutil.copytree(cache, directory / "numba")
    return environment


def prepare(directory: Path, setup: Setup, zipf: float) -> Path:
    """Everything that the guest needs, and the script that it runs."""
    subprocess.run(["gcc", "-O2", "-o", setup.program, Path(__file__).with_name("zipf.c")], check=True)
    random = np.random.default_rng(1)
    weights = np.arange(1, setup.pages + 1) ** -zipf
    weights = random.permutation(weights / weights.sum())
    np.save(setup.weights, weights)
    random.choice(setup.pages, _LENGTH, p=weights).astype(np.int32).tofile(setup.sequence)
    (directory / "setup.json").write_bytes(msgspec.json.encode(setup))
    exports = " ".join(f"{name}={value}" for name, value in _compiled(directory).items())
    program = directory / "run.sh"
    program.write_text(
        f"cp -r {directory}/numba /run/numba\ncd {ROOT}\n"
        f"export HOME=/run TMPDIR=/run NUMBA_CACHE_DIR=/run/numba {exports}\n"
        f"{sys.executable} -m bench.numa_inside {directory}/setup.json /dev/vport*p1\n"
    )
    return program


def _exact(outcome: Outcome) -> tuple[float, int] | None:
    """When 90 % were local, and how many pages had come by then; None: never."""
    if outcome.local:
        for (at, _, _), local, pages in zip(
            outcome.batches, outcome.local, np.cumsum([one[1] for one in outcome.batches]).tolist(), strict=True
        ):
            if local >= _SHARE:
                return at, int(pages)
        return None
    for at, local, pages in zip(outcome.sampled_at, outcome.sampled, outcome.migrated, strict=True):
        if local >= _SHARE:
            return at, pages
    return None


def _show(outcomes: list[Outcome]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["arm", "90 % local after", "pages by then", "in the end", "longest batch", "longest gap of the target"]
    for heading in (*headings, "touches/s", "wrong words"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for one in outcomes:
        if one.arm == VM:
            continue
        reached = _exact(one)
        table.add_row(
            one.arm,
            "never" if reached is None else f"{reached[0]:.2f} s",
            "" if reached is None else f"{reached[1]:,}",
            f"{one.sampled[-1]:.1%}",
            f"{max((took for _, _, took in one.batches), default=float('nan')) * 1e3:.1f} ms",
            f"{one.gap * 1e3:.1f} ms",
            f"{one.rate_after:,.0f}",
            str(one.wrong),
        )
    if any(one.arm != VM for one in outcomes):
        Console().print(table)


def _step(most: float) -> float:
    """Seconds between two marks of an axis: about five of them, each a round number."""
    exact = most / 5
    ten = 10.0 ** np.floor(np.log10(exact))
    return float(ten * min((1, 2, 5, 10), key=lambda factor: abs(factor * ten - exact)))


def _points(one: Outcome, most: float) -> str:
    """The line of an arm: known after each batch, or sampled."""
    ends = [at for at, _, _ in one.batches] if one.local else one.sampled_at
    both = zip([0.0, *ends], [0.0, *(one.local or one.sampled)], strict=True)
    pairs = [(at, local) for at, local in both if at <= most]
    pairs.append((most, pairs[-1][1]))
    return " ".join(f"{_LEFT + at / most * _WIDTH:.1f},{_TOP + (1 - local) * _HEIGHT:.1f}" for at, local in pairs)


def svg(outcomes: list[Outcome]) -> str:
    """The local share over time, a line for each arm; those of others are dashed."""
    shown = [one for one in outcomes if one.arm not in (TO_AND_FRO, VM)]
    most = max(max(one.sampled_at) for one in shown)
    # What takes ten times as long as all others would leave no room for them.
    ends = [reached[0] for one in shown if one.arm != BALANCING and (reached := _exact(one))]
    most = min(most, 1.3 * max(ends)) if ends else most
    parts = [f'<text class="title" x="{_LEFT}" y="24">Share of the accesses that are to the own node</text>']
    for tenth in range(0, 11, 2):
        y = _TOP + _HEIGHT * (1 - tenth / 10)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tenth * 10} %</text>')
    y = _TOP + _HEIGHT * (1 - _SHARE)
    parts.append(f'<line class="bar" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for at in np.arange(0, most, _step(most)).tolist():
        x = _LEFT + _WIDTH * at / most
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{at:.3g}</text>')
    words = "seconds after it went to the other node"
    parts.append(f'<text x="{_LEFT + _WIDTH / 2}" y="{_TOP + _HEIGHT + 38}" text-anchor="middle">{words}</text>')
    for number, one in enumerate(shown):
        style = f'stroke="{_COLOURS[number % len(_COLOURS)]}" stroke-width="2"'
        style += "" if one.arm in POLICIES and one.arm != "address" else ' stroke-dasharray="6 4"'
        parts.append(f'<polyline fill="none" {style} points="{_points(one, most)}"/>')
        x, y = _LEFT + _WIDTH + 14, _TOP + 20 * number + 6
        parts.append(f'<line {style} x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x + 34}" y="{y + 4}">{escape(one.arm)}</text>')
    width, height = _LEFT + _WIDTH + 180, _TOP + _HEIGHT + 52
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="Local share over time"><style>text{font:13px sans-serif}.title{font-size:15px;'
        "font-weight:600}.grid{stroke:#d8dee4}.bar{stroke:#57606a;stroke-dasharray:2 3}</style>"
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def claims_of(runs: list[list[Outcome]], moves: int) -> list[Claim]:
    """What hottest-first must reach, and a VM that was moved so many times."""
    by_arm = [{one.arm: one for one in outcomes} for outcomes in runs]

    def of(arm: str, which: int) -> list[float]:
        return [float(reached[which]) for each in by_arm if (reached := _exact(each[arm])) is not None]

    def middle(values: list[float]) -> float | None:
        return statistics.median(values) if len(values) == len(runs) else None

    claims = []
    for which, name, unit in ((0, "time until 90 % is local", "s"), (1, "pages until 90 % is local", "pages")):
        ours = of("hottest-first", which)
        for peer in ("address", MIGRATE, BALANCING):
            peers = of(peer, which)
            # One that never comes there is beaten by whatever does.
            against = middle(peers) if peers else float("inf")
            spread = (min(ours), max(ours)) if ours else None
            claims.append(claim(name, middle(ours), 0.4, unit, len(runs), peer=against, against=peer, spread=spread))
    batches = [
        max(took for _, _, took in one.batches) for each in by_arm for arm, one in each.items() if arm in POLICIES
    ]
    longest = max(batches) * 1e3
    gaps = [one.gap * 1e3 for each in by_arm for arm, one in each.items() if arm in POLICIES]
    claims.append(claim("longest wait of the target", max(gaps), 20, "ms", len(runs), spread=(min(gaps), max(gaps))))
    claims.append(claim("longest batch", longest, 20, "ms", len(runs), spread=(min(batches) * 1e3, longest)))
    wrong = sum(one.wrong for outcomes in runs for one in outcomes)
    claims.append(claim("wrong words", wrong, 0, "", len(runs)))
    vms = [each[VM] for each in by_arm]
    for name, least, bar in (
        ("moves of a VM's memory", min(len(one.sampled) for one in vms), moves),
        ("part of it that came each time", min(min(one.sampled) for one in vms), 0.99),
        ("the VM's passes over it meanwhile", min(one.migrated[-1] for one in vms), 1),
    ):
        claims.append(claim(name, least, bar, "", len(runs), at_least=True))
    return claims


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", type=click.IntRange(1, 20), default=1, show_default=True, help="Boots of the host.")
@click.option("--mib", type=click.IntRange(8, 256), default=256, show_default=True, help="What the target touches.")
@click.option("--zipf", type=click.FloatRange(0.1, 3), default=1.1, show_default=True, help="Exponent of its accesses.")
@click.option("--watch", type=click.FloatRange(0.5, 60), default=24.0, show_default=True, help="Seconds of looking.")
@click.option("--most", type=click.FloatRange(1, 300), default=40.0, show_default=True, help="Seconds of an arm.")
@click.option("--moves", type=click.IntRange(1, 1000), default=100, show_default=True, help="To and fro at the end.")
@click.option("--beside", is_flag=True, help="Work on the target's processor: where this machine is busy.")
@click.option("--arm", "arms", multiple=True, help="Only these arms.")
@click.option(
    "--svg", "picture", type=click.Path(path_type=Path), help="Draw the local share over time into this file."
)
def main(
    file: Path | None,
    runs: int,
    mib: int,
    zipf: float,
    watch: float,
    most: float,
    moves: int,
    beside: bool,
    arms: tuple[str, ...],
    picture: Path | None,
) -> None:
    """Have a process's memory follow it to the other node, by each policy."""
    image = build(ROOT / ".build/guest")
    chosen = list(arms) or [*POLICIES, MIGRATE, BALANCING, TO_AND_FRO, VM]
    console = Console(stderr=True)
    found: list[list[Outcome]] = []
    for _ in range(runs):
        directory = Path(tempfile.mkdtemp(prefix="outboard-bench-", dir="/var/tmp"))
        try:
            program, sequence, weights = (str(directory / name) for name in ("zipf", "sequence", "weights.npy"))
            vm = numa_vm.prepare(directory, ROOT / ".build/guest") if VM in chosen else []
            setup = Setup(chosen, program, sequence, weights, mib << 8, watch, most, 0.020, moves, beside, vm)
            script = prepare(directory, setup, zipf)
            console_log = directory / "console"
            seconds = 600 + (len(chosen) * 3 + LONGER * (VM in chosen)) * most
            try:
                run(image, script, directory / "results", console_log, _NODES, seconds)
            except subprocess.TimeoutExpired:
                console.print(f"the host of two nodes has not ended within {seconds:.0f} s")
            told = console_log.read_text(errors="replace")
            results = (directory / "results").read_bytes().splitlines()
        finally:
            shutil.rmtree(directory)
        outcomes = [msgspec.json.decode(line, type=Outcome) for line in results]
        if len(outcomes) != len(chosen):
            raise click.ClickException(f"the host of two nodes ended early; its console says:\n{told[-4000:]}")
        for one in outcomes:
            if one.arm == VM:
                took = statistics.median(np.diff([0.0, *one.sampled_at]).tolist())
                console.print(
                    f"{one.arm}: {len(one.sampled)} moves, {one.batches[-1][1]:,} pages and {took:.2f} s each, "
                    f"{one.migrated[-1]} passes over its memory, {one.wrong} of them wrong",
                    highlight=False,
                )
                continue
            console.print(
                f"{one.arm}: watched {one.watched:.1f} s, heat agrees {one.agrees:.2f}, "
                f"overhead of a call {one.overhead * 1e3:.2f} ms",
                highlight=False,
            )
        _show(outcomes)
        found.append(outcomes)
    if picture is not None:
        picture.write_text(svg(found[0]))
    if arms:
        return
    claims = claims_of(found, moves)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
