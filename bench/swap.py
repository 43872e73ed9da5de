"""script/bench swap: swapping out and in from a reservation, beside plain writes and reads of the same disk.

Swap-out is the eviction of a process's memory, page contents checked and signed; its peer writes as many bytes in
order, a MiB at a time. Swap-in is a fault, from its message to the page being there; its peer reads 4 KiB at random
places, one after each fault: a processor that has slept takes longer to hear from the disk than one that does nothing
but read, and a fault finds it asleep. (What it takes when nothing but that is done is shown too, and not compared.) All
of them go past the page cache, in one run, on the file system that the directory is on. The kernel's own swap is not
measured: most hosts of VMs have none.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from rich.console import Console

from outboard.linux import fallocate, proc
from outboard.pager.latency import Latencies
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.pages.shared import shared_array
from outboard.stores.reservation import Reservation
from outboard.stores.swap import SwapStore
from outboard.vmm.process import attach_process
from tests.support.target import Target

from .claims import Claim, claim, publish

_READS = 4000
_MIB = 1 << 20


def _plain_write(path: Path, mebibytes: int) -> float:
    """Bytes/s of writing a file in order that has its blocks already."""
    block = shared_array(_MIB, np.uint8)
    block[:] = np.random.default_rng(1).integers(0, 256, _MIB, dtype=np.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        began = time.perf_counter()
        for number in range(mebibytes):
            os.pwrite(fd, block.data, number * _MIB)
        os.fdatasync(fd)
        return mebibytes * _MIB / (time.perf_counter() - began)
    finally:
        os.close(fd)


def _plain_read_us(path: Path, places: list[int], before: Callable[[int], object] = lambda _: None) -> float:
    """The median; ``before`` is called with each place first, and not timed."""
    page = shared_array(PAGE_SIZE, np.uint8)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        took = []
        for place in places:
            before(place)
            began = time.perf_counter_ns()
            os.preadv(fd, [page.data], place * PAGE_SIZE)
            took.append(time.perf_counter_ns() - began)
        return statistics.median(took) / 1e3
    finally:
        os.close(fd)


class _Run:
    """What one run found, as (ours, the peer's)."""

    def __init__(self) -> None:
        self.first: list[tuple[float, float]] = []
        self.again: list[tuple[float, float]] = []
        self.fault: list[tuple[float, float]] = []
        self.awake: list[float] = []
        self.processor_ms: list[float] = []


def _swap_in_us(target: Target, pager: Pager, plain: Path, places: list[int]) -> tuple[float, float]:
    """Of the faults of one look alone: the pager's histogram keeps them all."""
    before = pager.statistics().faults.latencies
    peer = _plain_read_us(plain, places, lambda place: target.ask(f"r {place}"))
    after = pager.statistics().faults.latencies
    return Latencies(after.counts - before.counts).percentile_us(0.5) or math.inf, peer


def _measure(directory: Path, journal: Path, mebibytes: int, runs: int, *, thin: bool) -> _Run:
    found = _Run()
    plain = directory / "plain"
    fd = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fallocate.allocate(fd, 0, mebibytes * _MIB)
    os.close(fd)
    _plain_write(plain, mebibytes)
    with Target(mebibytes=mebibytes) as target, attach_process(target.pid) as guest:
        reservation = Reservation(directory / "swap", mebibytes * _MIB, thin=thin)
        store = SwapStore(reservation, "bench", guest.pages, journal)
        pager = Pager(guest, Residency(guest.pages, journal), {Where.FILE: store})
        whole = PageSet.full(guest.pages)
        for run in range(runs):
            places = random.Random(run).sample(range(guest.pages), _READS)  # noqa: S311  # places, not secrets
            for figures in (found.first, found.again):
                peer = _plain_write(plain, mebibytes)
                began, used = time.perf_counter(), time.process_time()
                pager.evict(whole, Where.FILE)
                os.fdatasync(store.fileno())
                os.fdatasync(store.lender())
                found.processor_ms.append((time.process_time() - used) * 1e3 / mebibytes)
                figures.append((mebibytes * _MIB / (time.perf_counter() - began), peer))
                if figures is found.again:
                    found.fault.append(_swap_in_us(target, pager, plain, places))
                    found.awake.append(_plain_read_us(plain, places))
                pager.fetch(whole)
            # The next run takes its blocks from the reservation again.
            store.trim(0)
        pager.release()
        store.close()
    return found


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--mebibytes", default=512, show_default=True, help="Memory of the process.")
@click.option("--thin/--lent", default=True, help="Swap files of blocks of their own, or units of the reservation.")
@click.option("--directory", type=click.Path(path_type=Path), help="On the disk that is measured; a temporary one.")
def main(file: Path | None, runs: int, mebibytes: int, thin: bool, directory: Path | None) -> None:
    """Measure swapping beside the disk itself."""
    place = Path(tempfile.mkdtemp(prefix="outboard-bench-", dir=directory))
    journal = Path(tempfile.mkdtemp(prefix="outboard-bench-", dir="/dev/shm"))  # journals lie in memory
    try:
        found = _measure(place, journal, mebibytes, runs, thin=thin)
    finally:
        shutil.rmtree(place)
        shutil.rmtree(journal)

    def one(name: str, figures: list[tuple[float, float]], scale: float, bar: float, unit: str, peer: str) -> Claim:
        ours, theirs = ([figure[index] / scale for figure in figures] for index in (0, 1))
        return claim(
            name,
            statistics.median(ours),
            bar,
            unit,
            runs,
            peer=statistics.median(theirs),
            against=peer,
            spread=(min(ours), max(ours)),
            at_least=unit != "us",
        )

    claims = [
        one("swap-out, blocks taken from the reservation", found.first, 1e6, 0.7, "MB/s", "plain sequential write"),
        one("swap-out, blocks already there", found.again, 1e6, 0.7, "MB/s", "plain sequential write"),
        one("swap-in, p50", found.fault, 1, 1.3, "us", "plain read of 4 KiB after each"),
    ]
    publish(claims, file, Console())
    Console().print(
        f"processor time of a MiB swapped out: {statistics.median(found.processor_ms):.2f} ms; "
        f"plain read of 4 KiB, doing nothing else: {statistics.median(found.awake):.1f} us; "
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    )
    if not proc.meminfo()["SwapTotal"]:
        Console().print("this host has no swap of its own: nothing to measure the kernel's by")
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
