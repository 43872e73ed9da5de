"""script/chaos: SIGKILL engines at random moments, under random eviction and writers that verify every word they wrote.

Two thirds of the kills hit the engine of a process with three writing threads, which is started again by this program;
one third the engine of a Debian guest that writes 5,000 pages/s, which its agent starts again. A kill counts as
recovered when the next engine serves faults.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

from outboard.agent.orders import Evict, Fetch, Order, ask
from outboard.errors import OutboardError
from outboard.linux import pidfd
from tests.support.cluster import Cluster

from .claims import Claim, claim, publish
from .managed import ManagedGuest, ManagedProcess

_CALM_S = 60.0


def _orders(chance: random.Random) -> Iterator[Order]:
    while True:
        to = chance.choice(["pool", "file"])
        yield Evict(to="file" if to == "file" else "pool", most=chance.randrange(1, 32) << 20, idle=0.0)
        if chance.random() < 0.3:
            yield Fetch()


def _disturb(control: Path, chance: random.Random, ending: threading.Event) -> None:
    orders = _orders(chance)
    while not ending.is_set():
        # Whoever dies meanwhile has not answered.
        with contextlib.suppress(OutboardError):
            ask(control, next(orders), 5.0)


def play(
    name: str, scene: ManagedProcess | ManagedGuest, kills: int, chance: random.Random, say: Callable[[str], None]
) -> list[Claim]:
    """Kill ``kills`` engines; how long each took to be replaced, and what the writers find in the end."""
    took: list[float] = []
    engine = scene.next()
    ending = threading.Event()
    # An engine that waits for nobody's order is killed in its faults, one that carries out an order anywhere.
    orders = random.Random(chance.random())  # noqa: S311
    disturber = threading.Thread(target=_disturb, args=(scene.control, orders, ending))
    disturber.start()
    try:
        for number in range(1, kills + 1):
            time.sleep(chance.uniform(0.0, 0.25))
            began = time.monotonic()
            os.kill(engine, signal.SIGKILL)
            while pidfd.alive(engine):
                os.sched_yield()
            engine = scene.next()
            took.append((time.monotonic() - began) * 1e3)
            if number % 50 == 0:
                say(f"{number} kills, recovery median {statistics.median(took):.0f} ms")
    finally:
        ending.set()
        disturber.join(_CALM_S)
    return [
        claim(
            f"{name}: recovery, median", statistics.median(took), 300, "ms", len(took), spread=(min(took), max(took))
        ),
        claim(f"{name}: what is wrong", scene.wrong(), 0, "", len(took)),
    ]


@click.command()
@click.option("--kills", default=300, show_default=True, help="A third of them at the engine of a real guest.")
@click.option("--seed", type=int, help="Of the moments and orders; another one each time when not given.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
def main(kills: int, seed: int | None, file: Path | None) -> None:
    """Kill engines, and let the writers judge."""
    console = Console(stderr=True)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    console.print(f"seed {seed}")
    chance = random.Random(seed)  # noqa: S311  # moments and orders, not secrets
    directory = Path(tempfile.mkdtemp(prefix="outboard-chaos-", dir="/dev/shm"))  # the pool is memory
    claims: list[Claim] = []
    try:
        process = ManagedProcess(directory / "process")
        try:
            claims += play("a process", process, kills - kills // 3, chance, console.print)
        finally:
            process.close()
        with Cluster(31) as cluster:
            claims += play("a guest", ManagedGuest(cluster), kills // 3, chance, console.print)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
