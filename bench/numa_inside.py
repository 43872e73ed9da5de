"""What ``script/bench numa`` runs on the host of two nodes: a target goes to the other one, and its memory after it.

``python -m bench.numa_inside SETUP RESULTS``: reads what to do from a JSON file and writes an outcome a line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.linux.numa import migrate_pages, nodes_of_pages
from outboard.numa.following import Follower
from outboard.numa.moving import Limits, Mover, Pace, Rests
from outboard.numa.policies import POLICIES, UNKNOWN, Memory
from outboard.numa.warmth import watch
from outboard.numa.whereabouts import Whereabouts, free_of
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_process

from .numa_vm import to_and_fro

MIGRATE, BALANCING, TO_AND_FRO = "migrate_pages", "kernel balancing", "to and fro"
VM = "a VM, to and fro"
_BALANCING = Path("/proc/sys/kernel/numa_balancing")
_PERIOD_S, _SAMPLE = 0.2, 2048
_HOT, _WARM = 1000, 20
LONGER = 15
"""How many times as long as another arm a VM's may take."""


class Setup(msgspec.Struct):
    """What to do: arms by name, on a target of so many pages that touches them as the file has it.

    ``watch``: seconds of looking; ``most``: seconds that an arm may take; ``stall``: seconds of a batch;
    ``moves``: how often the hottest go to and fro, and all of the VM that ``vm`` starts. ``beside``: work on the
    target's own processor, where it takes turns with it, instead of on the other.
    """

    arms: list[str]
    program: str
    sequence: str
    weights: str
    pages: int
    watch: float
    most: float
    stall: float
    moves: int
    beside: bool = False
    vm: list[str] = []


class Outcome(msgspec.Struct):
    """Of an arm: the local share at some moments, as sampled, and how many pages had come by then, likewise. Of the
    VM's: the share of its memory that was where it should be after each move, and its passes over it in all.

    ``batches``: end, pages and seconds of each; ``local``: the true share after each. ``gap``: the longest that the
    target waited for 16 touches, and ``wrong`` words that it found. ``agrees``: how well the watched heat orders pages
    as they are truly touched, as a rank correlation. ``planned``: the seconds that ordering them took, before the
    target went. ``overhead``: the median of calls that move nothing.
    """

    arm: str
    sampled_at: list[float]
    sampled: list[float]
    migrated: list[int]
    batches: list[tuple[float, int, float]]
    local: list[float]
    gap: float
    rate_before: float
    rate_after: float
    wrong: int
    watched: float = 0.0
    agrees: float = 0.0
    planned: float = 0.0
    overhead: float = 0.0


class Target:
    """zipf.c on the first processor, and its memory on that node, from ``start`` on."""

    def __init__(self, setup: Setup, kind: str) -> None:
        self._process = subprocess.Popen(
            [setup.program, setup.sequence, str(setup.pages), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=lambda: os.sched_setaffinity(0, {0}),  # no thread of ours runs yet
        )
        self.pid = self._process.pid
        self.start = int(self._line().split()[1])

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, order: str) -> list[int]:
        """Give an order; the numbers of its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        return [int(word) for word in self._line().split() if word.isdigit()]

    def rate(self) -> float:
        """Touches a second."""
        began, before = time.monotonic(), self.ask("e")[0]
        time.sleep(0.3)
        return (self.ask("e")[0] - before) / (time.monotonic() - began)

    def close(self) -> None:
        """End it."""
        with self._process:
            self._process.kill()


class _Recorded:
    """Whereabouts that remember when each unit came."""

    def __init__(self, where: Whereabouts) -> None:
        self._where = where
        self.began = 0.0
        self.batches: list[tuple[float, int, float]] = []
        self.came: list[NDArray[np.int64]] = []
        self.overheads: list[float] = []

    def overhead(self) -> float:
        self.overheads.append(self._where.overhead())
        return self.overheads[-1]

    def nodes(self, units: NDArray[np.int64]) -> NDArray[np.int16]:
        return self._where.nodes(units)

    def move(self, units: NDArray[np.int64], node: int) -> tuple[NDArray[np.int32], float]:
        status, took = self._where.move(units, node)
        there = units[status == node]
        self.batches.append((time.monotonic() - self.began, int(there.size), took))
        self.came.append(there)
        return status, took


class _Sampler(threading.Thread):
    """Where a sample of the accesses goes, and where a sample of the pages is, five times a second."""

    def __init__(self, target: Target, setup: Setup, weights: NDArray[np.float64], began: float) -> None:
        super().__init__(daemon=True)
        random = np.random.default_rng(7)
        pages = np.concatenate(
            (random.choice(setup.pages, _SAMPLE, p=weights), random.integers(setup.pages, size=_SAMPLE))
        )
        self._pid, self._pages, self._began = target.pid, setup.pages, began
        self._addresses = target.start + pages * 4096
        self.ended = threading.Event()
        self.at: list[float] = []
        self.shares: list[float] = []
        self.migrated: list[int] = []

    def run(self) -> None:
        while not self.ended.wait(_PERIOD_S):
            self.look()

    def look(self) -> None:
        there = nodes_of_pages(self._pid, self._addresses) == 1
        self.at.append(time.monotonic() - self._began)
        self.shares.append(float(there[:_SAMPLE].mean()))
        self.migrated.append(round(float(there[_SAMPLE:].mean()) * self._pages))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, those of equal values the same."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - counts / 2)[inverse])


def _follower(where: _Recorded, setup: Setup, arm: str, memory: Memory) -> Follower:
    return Follower(
        where,
        memory,
        Mover(POLICIES[arm], 1, Limits(64, 4096), free_of(1) // 4096),
        Pace(setup.stall, 64, 65536, 16),
        Rests(setup.pages, 60),
        time.monotonic,
        time.sleep,
    )


def run(setup: Setup, arm: str, weights: NDArray[np.float64]) -> Outcome:
    """One arm: the target begins on node 0, goes to node 1, and its memory after it."""
    _BALANCING.write_text("0")
    if setup.beside:
        os.sched_setaffinity(0, {0})
    with ExitStack() as stack:
        stack.callback(_BALANCING.write_text, "0")
        # The kernel's balancing leaves pages of a file where they are, those of memfd too.
        target = Target(setup, "private" if arm == BALANCING else "shared")
        stack.callback(target.close)
        guest = None if arm == BALANCING else stack.enter_context(attach_process(target.pid))
        time.sleep(0.5)
        before = target.rate()
        cold = np.zeros(setup.pages)
        memory = Memory(cold, cold, np.full(setup.pages, UNKNOWN, dtype=np.int16))
        watched = planned = overhead = 0.0
        recorded: _Recorded | None = None
        if guest is not None and arm in POLICIES:
            if POLICIES[arm].order != "address":
                began = time.monotonic()
                memory = watch(guest, 1, setup.watch)
                watched = time.monotonic() - began
            began = time.monotonic()
            recorded = _Recorded(stack.enter_context(Whereabouts(guest, 1)))
            follower = _follower(recorded, setup, arm, memory)
            planned = time.monotonic() - began
        agrees = float(np.corrcoef(_ranks(memory.heat), _ranks(weights))[0, 1]) if watched else 0.0
        if arm == BALANCING:
            _BALANCING.write_text("1")
        os.sched_setaffinity(target.pid, {1})
        if setup.beside:
            os.sched_setaffinity(0, {1})
        target.ask("g")
        sampler = _Sampler(target, setup, weights, time.monotonic())
        sampler.look()
        if recorded is None:
            sampler.start()
        began = time.monotonic()
        batches: list[tuple[float, int, float]] = []
        local: list[float] = []
        if recorded is not None:
            recorded.began = began
            while follower.step() and time.monotonic() < began + setup.most:
                pass
            batches = recorded.batches
            overhead = float(np.median(recorded.overheads))
            local = np.cumsum([weights[came].sum() for came in recorded.came]).tolist()
        elif arm == MIGRATE:
            migrate_pages(target.pid, 0, 1)
            batches = [(time.monotonic() - began, setup.pages, time.monotonic() - began)]
        elif arm == BALANCING:
            while time.monotonic() < began + setup.most and sampler.shares[-1] < 0.95:
                time.sleep(_PERIOD_S)
        elif guest is not None:
            batches = _to_and_fro(guest, setup, weights, began)
        sampler.ended.set()
        if recorded is None:
            sampler.join()
        sampler.look()
        gap = target.ask("e")[1] / 1e9
        after = target.rate()
        wrong = target.ask("v")[0]
    return Outcome(
        arm,
        sampler.at,
        sampler.shares,
        sampler.migrated,
        batches,
        local,
        gap,
        before,
        after,
        wrong,
        watched,
        agrees,
        planned,
        overhead,
    )


def _to_and_fro(
    guest: Guest, setup: Setup, weights: NDArray[np.float64], began: float
) -> list[tuple[float, int, float]]:
    """The hottest pages go to the other node and back, again and again, while they are written."""
    hottest = np.argsort(-weights)[:_HOT]
    batches = []
    with Whereabouts(guest, 1) as where:
        for number in range(setup.moves):
            node = (number + 1) % 2
            for first in range(0, _HOT, 100):
                status, took = where.move(hottest[first : first + 100], node)
                batches.append((time.monotonic() - began, int((status == node).sum()), took))
    return batches


def _with_vm(setup: Setup) -> Outcome:
    """All of a VM's memory goes to and fro."""
    done = to_and_fro(setup.vm, setup.moves, LONGER * setup.most, setup.stall)
    passes = [done.passes] * len(done.at)
    return Outcome(VM, done.at, done.shares, passes, done.batches, [], 0.0, 0.0, 0.0, done.wrong)


def main() -> None:
    """Run the arms, one after the other."""
    setup = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Setup)
    weights = np.load(setup.weights)
    # What is run for the first time TCG translates first, which would count as a stall.
    run(msgspec.structs.replace(setup, moves=_WARM), TO_AND_FRO, weights)
    with Path(sys.argv[2]).open("wb") as results:
        for arm in setup.arms:
            print(f"{arm} begins", flush=True)
            outcome = _with_vm(setup) if arm == VM else run(setup, arm, weights)
            results.write(msgspec.json.encode(outcome) + b"\n")
            results.flush()


if __name__ == "__main__" and len(sys.argv) == 3:
    main()
