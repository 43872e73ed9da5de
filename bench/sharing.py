"""script/bench sharing: four clones of a guest that keep what they have in common once, beside the kernel's KSM.

The clones are processes of the same content: a fifth of it zeros, a tenth each clone's own, the rest in common. What
could be freed is counted exactly, by the pages' whole content. Ours shares memory in files by the overlay; KSM merges
the same content in anonymous memory, at the pace that it is set to here, which is as fast as it goes. Time runs until
80 % of what an exact count says is free; processor time is that of the sharing process and the guests for us, and that
of ksmd for KSM.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from outboard.linux import ksm, proc
from outboard.pages import PAGE_SIZE
from outboard.sharing.domain import Domain
from outboard.sharing.ksm import Merging
from outboard.sharing.pool import Pool
from outboard.sharing.scan import SECRET
from tests.support.process_guest import guest_of
from tests.support.sharing import ProcessMember, blocks_of
from tests.support.target import Target

from .claims import Claim, claim, publish

CLONES = 4
_ENOUGH = 0.8
_LIMIT_S = 300.0
_KSM = {"run": 1, "pages_to_scan": 100_000, "sleep_millisecs": 0, "use_zero_pages": 1}


def contents(mebibytes: int, seed: int) -> list[NDArray[np.uint8]]:
    """What each clone's memory holds, a page a row."""
    random = np.random.default_rng(seed)
    pages = mebibytes << 8
    common = random.integers(0, 256, (pages, PAGE_SIZE), dtype=np.uint8)
    common[random.random(pages) < 0.2] = 0
    made = []
    for _ in range(CLONES):
        clone = common.copy()
        own = np.flatnonzero(random.random(pages) < 0.1)
        clone[own] = random.integers(0, 256, (own.size, PAGE_SIZE), dtype=np.uint8)
        made.append(clone)
    return made


def exactly(clones: list[NDArray[np.uint8]]) -> int:
    """Pages of memory that one copy of each content would free, none of zeros."""
    pages = [page.tobytes() for clone in clones for page in clone]
    return len(pages) - len(set(pages) - {bytes(PAGE_SIZE)})


@dataclass
class Ran:
    """One run: the share of what an exact count says was freed, how long until 80 % of it, in which processor time."""

    freed: float
    seconds: float
    processor: float
    rate: float = 0.0


def ours(clones: list[NDArray[np.uint8]], could: int) -> Ran:
    """Share by the overlay."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    pool = Pool(directory / "pool", np.random.default_rng(1))
    members: list[ProcessMember] = []
    try:
        for number, clone in enumerate(clones):
            target = Target(mebibytes=clone.shape[0] >> 8)
            members.append(ProcessMember(str(number), directory, pool.fileno(), target=target))
            members[-1].guest.memory.write(0, clone.reshape(-1).data)
        secret = np.frombuffer(os.urandom(SECRET), dtype=np.uint8).copy()
        domain = Domain(members, pool, secret)
        whole = sum(member.pages for member in members)
        began, used = time.perf_counter(), _processor(members)
        freed, took, spent = 0, _LIMIT_S, 0.0
        for _ in range(3):
            domain.round()
            freed = whole - sum(member.resident() for member in members) - blocks_of(pool.fileno()) // PAGE_SIZE
            if freed >= _ENOUGH * could:
                took, spent = time.perf_counter() - began, _processor(members) - used
                break
        return Ran(freed / could, took, spent, domain.speed())
    finally:
        for member in members:
            member.close()
        pool.close()
        shutil.rmtree(directory)


def _processor(members: list[ProcessMember]) -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    theirs = sum(
        proc.processor_seconds(member.target.pid, thread.tid)
        for member in members
        for thread in proc.threads(member.target.pid)
    )
    return own.ru_utime + own.ru_stime + theirs


def kernels(clones: list[NDArray[np.uint8]], could: int) -> Ran:
    """Merge by KSM."""
    before = {name: ksm.setting(name) for name in _KSM}
    ksmd = next(int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit() and _name(one) == "ksmd")
    try:
        with contextlib.ExitStack() as until_end:
            guests = []
            for clone in clones:
                target = until_end.enter_context(Target("anon", mebibytes=clone.shape[0] >> 8))
                guests.append(until_end.enter_context(guest_of(target)))
                guests[-1].memory.write(0, clone.reshape(-1).data)
            for name in ("use_zero_pages", "pages_to_scan", "sleep_millisecs"):
                ksm.setting(name, _KSM[name])
            ways = [until_end.enter_context(Merging(guest)) for guest in guests]
            ksm.setting("run", 1)
            began, used = time.perf_counter(), proc.processor_seconds(ksmd, ksmd)
            deadline = began + _LIMIT_S
            freed = 0
            while freed < _ENOUGH * could and time.perf_counter() < deadline:
                time.sleep(0.02)
                freed = ksm.setting("pages_sharing") + sum(way.statistics().zeros for way in ways)
            took, spent = time.perf_counter() - began, proc.processor_seconds(ksmd, ksmd) - used
            return Ran(freed / could, took, spent)
    finally:
        for name, value in before.items():
            ksm.setting(name, value)


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def _median(runs: list[Ran], of: Callable[[Ran], float]) -> float:
    return statistics.median(of(run) for run in runs)


def claims_of(own: list[Ran], peer: list[Ran]) -> list[Claim]:
    """What four clones must reach."""
    count = len(own)
    return [
        claim(
            "scan of guest memory, one processor",
            _median(own, lambda run: run.rate) / 1e9,
            2.4,
            "GB/s",
            count,
            at_least=True,
        ),
        claim("freed, of an exact count", _median(own, lambda run: run.freed), _ENOUGH, "", count, at_least=True),
        claim(
            "time until 80 % is free",
            _median(own, lambda run: run.seconds),
            1.0,
            "s",
            count,
            peer=_median(peer, lambda run: run.seconds) if peer else None,
            against="KSM",
            spread=(min(run.seconds for run in own), max(run.seconds for run in own)),
        ),
        claim(
            "processor time until then",
            _median(own, lambda run: run.processor),
            1.0,
            "s",
            count,
            peer=_median(peer, lambda run: run.processor) if peer else None,
            against="KSM",
        ),
    ]


@click.command()
@click.option("--runs", default=3, show_default=True)
@click.option("--mib", default=128, show_default=True, help="Memory of each clone.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
def main(runs: int, mib: int, file: Path | None) -> None:
    """Share, merge, and compare."""
    console = Console(stderr=True)
    own: list[Ran] = []
    peer: list[Ran] = []
    for number in range(runs):
        clones = contents(mib, number)
        could = exactly(clones)
        own.append(ours(clones, could))
        console.print(f"ours {own[-1]}")
        if ksm.present():
            peer.append(kernels(clones, could))
            console.print(f"KSM {peer[-1]}")
    claims = claims_of(own, peer)
    publish(claims, file, Console())
    sys.exit(0 if all(each.met for each in claims) else 1)


if __name__ == "__main__":
    main()
