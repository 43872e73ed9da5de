"""script/bench pager: faults served from memory, eviction and population, through the engine of a real process.

The peer is the one public userfaultfd handler that Debian 12 installs and that runs here: stress-ng's, a thread in C
that serves its own process from one buffer, knows no stores and keeps no books. CRIU 3.17's lazy-pages does not start
on kernels whose vDSO it does not know.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from outboard.agent.holding import CONTROL
from outboard.agent.orders import Evict, Release, ask
from outboard.errors import OutboardError
from outboard.linux import pidfd, process_madvise
from outboard.linux.process_madvise import Advice
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_process

from .claims import Claim, claim, publish
from .engines import engine
from .touchers import Toucher

_GIB = 1 << 30


def _faults(toucher: Toucher, directory: Path, runs: int) -> dict[str, list[tuple[float, float, float]]]:
    """Evict everything by an engine, touch everything; what the toucher measured, by store and order."""
    engines = multiprocessing.get_context("spawn")
    ours, theirs = engines.Pipe()
    process = engines.Process(target=engine, args=(str(directory), toucher.pid, theirs))
    process.start()
    ours.recv_bytes()
    control = directory / "memory" / CONTROL
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(runs):
        for to, order in (("pool", "s"), ("pool", "r"), ("file", "s")):
            moved = ask(control, Evict(to="pool" if to == "pool" else "file", idle=0.0)).moved
            if moved < toucher.pages * PAGE_SIZE * 0.99:
                raise OutboardError(f"only {moved} bytes went")
            found.setdefault(to + order, []).append(toucher.touch(order))
    ask(control, Release())
    process.join()
    return found


def _rate(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def _batches(guest: Guest, directory: Path, runs: int) -> dict[str, list[float]]:
    """Pages a second evicted, in order and scattered; seconds a GiB populated."""
    (directory / "journal").mkdir()
    stores = {Where.POOL: FileStore(directory / "batch-pool", guest.pages)}
    pager = Pager(guest, Residency(guest.pages, directory / "journal"), stores)
    whole = PageSet.full(guest.pages)
    scattered = PageSet.from_mask((whole.numbers() * 2654435761 % 4 == 0) & whole.mask())
    found: dict[str, list[float]] = {"whole": [], "scattered": [], "populated": []}
    process = pidfd.open(guest.pid)
    for _ in range(runs):
        found["whole"].append(_rate(guest.pages, partial(pager.evict, whole, Where.POOL)))
        pager.fetch(whole)
        found["scattered"].append(_rate(len(scattered), partial(pager.evict, scattered, Where.POOL)))
        pager.fetch(whole)
        spans = [(region.hva, region.pages * PAGE_SIZE) for region in guest.regions]
        process_madvise.advise(process, spans, Advice.PAGEOUT)
        found["populated"].append(_GIB / PAGE_SIZE / _rate(guest.pages, partial(pager.populate, whole)))
    pidfd.close(process)
    pager.release()
    return found


def _peer(mebibytes: int, seconds: int) -> tuple[float, float] | None:
    """stress-ng's faults a second, and microseconds a fault; None where it is not installed."""
    program = shutil.which("stress-ng")
    if program is None:
        return None
    command = [program, "--userfaultfd", "1", "--userfaultfd-bytes", f"{mebibytes}m", "-t", str(seconds), "--metrics"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    rate = re.search(r"userfaultfd\s+\d+\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+([\d.]+)", said)
    each = re.search(r"([\d.]+) nanosecs per page fault", said)
    if rate is None or each is None:
        raise OutboardError(f"stress-ng says nothing that can be read: {said}")
    return float(rate[1]), float(each[1]) / 1e3


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=5, show_default=True)
@click.option("--mebibytes", default=256, show_default=True, help="Memory of the process.")
def main(file: Path | None, runs: int, mebibytes: int) -> None:
    """Measure the pager beside stress-ng's handler."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-bench-", dir="/dev/shm"))  # the pool is memory
    toucher = Toucher(directory, mebibytes)
    try:
        faults = _faults(toucher, directory, runs)
        with attach_process(toucher.pid) as guest:
            batches = _batches(guest, directory, runs)
    finally:
        toucher.close()
        shutil.rmtree(directory)
    claims = _claims(faults, batches, toucher.pages, runs, _peer(mebibytes, 5))
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


def _claims(
    faults: dict[str, list[tuple[float, float, float]]],
    batches: dict[str, list[float]],
    pages: int,
    runs: int,
    peer: tuple[float, float] | None,
) -> list[Claim]:
    def one(name: str, values: list[float], bar: float, unit: str, *, at_least: bool = False) -> Claim:
        spread = min(values), max(values)
        return claim(name, statistics.median(values), bar, unit, runs, spread=spread, at_least=at_least)

    rates = [pages / took for took, _, _ in faults["pools"]]
    medians = [p50 for _, p50, _ in faults["pools"]]
    found = [
        one("fault from the pool, p50", medians, 20, "us"),
        one("fault from the pool, p50, shuffled", [p50 for _, p50, _ in faults["poolr"]], 20, "us"),
        one("fault from the swap file, p50", [p50 for _, p50, _ in faults["files"]], 20, "us"),
        one("faults from the pool", rates, 40_000, "/s", at_least=True),
        one("eviction", batches["whole"], 60_000, "pages/s", at_least=True),
        one("eviction of scattered pages", batches["scattered"], 60_000, "pages/s", at_least=True),
        one("population of a GiB", batches["populated"], 0.15, "s"),
    ]
    if peer is not None:
        rate, each = peer
        name = "stress-ng --userfaultfd"
        found.append(claim("faults", statistics.median(rates), 1.0, "/s", runs, peer=rate, against=name, at_least=True))
        found.append(claim("time of a fault", statistics.median(medians), 1.0, "us", runs, peer=each, against=name))
    return found


if __name__ == "__main__":
    main()
