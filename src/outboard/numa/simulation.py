"""A host that is not there: the code that places vCPUs and orders moves, on recorded heat and a topology.

Only what the host would do is made up here: a batch takes as long as copying its bytes over the distance does, and
those that go to one node at the same time share its bandwidth. Nothing is random and no clock is read: the same
recordings give the same outcome.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import SpecError
from outboard.numa.moving import Batch, Limits, Mover, Rests
from outboard.numa.placement import Load, Model, Vcpu
from outboard.numa.policies import ABSENT, Memory, Policy, local_share
from outboard.numa.topology import Topology

UNIT = 2 << 20
"""Bytes of what moves as one."""
_HOT = 0.95
"""The units with this part of the accesses are the working set."""


class Recording(NamedTuple):
    """What was seen of a guest: accesses and writes per second, a row for each period, a column for each unit.

    ``node``: on which node, counted from 0 in the topology's order, each unit is in the beginning.
    """

    heat: NDArray[np.float32]
    writes: NDArray[np.float32]
    node: NDArray[np.int16]
    vcpus: int


class Host(msgspec.Struct, frozen=True):
    """How fast the host is: bytes/s of copying within a node; from afar it is slower as accesses are.

    :param batch_s: what each batch costs beside its bytes.
    """

    bandwidth: float = 4e9
    batch_s: float = 50e-6


class Outcome(NamedTuple):
    """What came of it, at the end of each step; ``to``: the node of each guest's vCPUs, counted from 0.

    ``local``: the part of all accesses that stayed on their node; ``latency``: ns of an access, without caches.
    ``moved`` and ``left``: units moved to their guests' nodes, and off them to make room, until then.
    """

    times: list[float]
    local: list[float]
    latency: list[float]
    moved: list[int]
    left: list[int]
    to: list[int]

    def until(self, share: float) -> float:
        """When the local share was first reached, in seconds; infinite: never."""
        return next((at for at, local in zip(self.times, self.local, strict=True) if local >= share), float("inf"))


def save(recording: Recording, path: Path) -> None:
    """Write a recording as .npz.

    :raise OSError: it could not be written.
    """
    np.savez_compressed(path, heat=recording.heat, writes=recording.writes, node=recording.node, vcpus=recording.vcpus)


def load(path: Path) -> Recording:
    """Read a recording.

    :raise SpecError: it cannot be read, or is none.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            recording = Recording(found["heat"], found["writes"], found["node"].astype(np.int16), int(found["vcpus"]))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SpecError(f"{path} is no recording of heat: {error}") from error
    heat, writes, node, vcpus = recording
    if heat.ndim != 2 or heat.shape != writes.shape or node.shape != heat.shape[1:] or not heat.size or vcpus < 1:
        raise SpecError(
            f"{path} is no recording of heat: it has {heat.shape} of heat, {node.shape} nodes, {vcpus} vCPUs"
        )
    if not all(np.isfinite(one).all() and (one >= 0).all() for one in (heat, writes)) or node.min() < ABSENT:
        raise SpecError(f"{path} is no recording of heat: a number in it is below zero or none")
    return recording


def working_set(memory: Memory, nodes: int) -> list[int]:
    """Bytes on each node of the units that have nearly all of the accesses."""
    hottest = np.argsort(-memory.heat, kind="stable")
    share = np.cumsum(memory.heat[hottest])
    used = hottest[: int(np.searchsorted(share, _HOT * share[-1])) + 1]
    used = used[memory.node[used] != ABSENT]
    return [int(one) * UNIT for one in np.bincount(memory.node[used], minlength=nodes)]


class _Guest:
    def __init__(self, recording: Recording, nodes: int) -> None:
        if int(recording.node.max()) >= nodes:
            raise SpecError(f"a recording has memory on node {recording.node.max()}, the topology only {nodes} nodes")
        self.recording = recording
        self.rests = Rests(recording.node.size, 60.0)
        self.memory = Memory(np.empty(0), np.empty(0), recording.node.copy())
        self.see(0)
        self.mover: Mover

    def see(self, frame: int) -> None:
        row = min(frame, len(self.recording.heat) - 1)
        heat, writes = self.recording.heat[row], self.recording.writes[row]
        self.memory = Memory(heat.astype(np.float64), writes.astype(np.float64), self.memory.node)


def _targets(topology: Topology, guests: Sequence[_Guest], load: Load) -> list[int]:
    """The node that most of each guest's vCPUs are placed on."""
    vcpus = []
    for number, guest in enumerate(guests):
        used, count = working_set(guest.memory, len(topology.nodes)), guest.recording.vcpus
        rate = float(guest.memory.heat.sum()) / count or 1.0
        vcpus += [Vcpu(str(number), one, [part // count for part in used], rate) for one in range(count)]
    placed = Model(topology, load).place(vcpus)
    column = {node.number: index for index, node in enumerate(topology.nodes)}
    node_of = {one.number: column[one.node] for one in topology.processors}
    found = [[0] * len(topology.nodes) for _ in guests]
    for one, processor in zip(vcpus, placed.processors, strict=True):
        found[int(one.guest)][node_of[processor]] += 1
    return [int(np.argmax(counts)) for counts in found]


class Simulation:
    """A host with guests.

    :param to: the node of each guest's vCPUs; None: they are placed.
    :raise SpecError: a recording does not fit the topology; the guests do not fit its memory.

    Synchronization: none.
    """

    def __init__(
        self,
        topology: Topology,
        recordings: Sequence[Recording],
        policy: Policy,
        limits: Limits,
        host: Host,
        to: Sequence[int] | None = None,
    ) -> None:
        count = len(topology.nodes)
        self._guests = [_Guest(one, count) for one in recordings]
        self.free = [node.memory // UNIT for node in topology.nodes]
        for one in self._guests:
            there = one.memory.node[one.memory.node != ABSENT]
            for node, taken in enumerate(np.bincount(there, minlength=count)):
                self.free[node] -= int(taken)
        if min(self.free) < 0:
            raise SpecError(f"the guests have more memory on node {int(np.argmin(self.free))} than it has")
        self.to = list(to) if to is not None else _targets(topology, self._guests, Load())
        self._host, self._moved, self._left = host, 0, 0
        origins = [index for index, node in enumerate(topology.nodes) if node.processors]
        rows = dict(zip(origins, topology.between_nodes(), strict=True))
        if any(node not in rows for node in self.to):
            raise SpecError(f"a guest's vCPUs cannot run on a node without processors; they may on {origins}")
        self._ns = np.array([rows[node] for node in self.to])
        self._nearest = np.array([min(rows[node]) for node in self.to])
        for guest, node in zip(self._guests, self.to, strict=True):
            guest.mover = Mover(policy, node, limits, self.free[node])
            guest.mover.plan(guest.memory)

    def _move(self, number: int, batch: Batch, now: float, sharing: int) -> float:
        """Move a batch; seconds it takes."""
        guest, to = self._guests[number], self.to[number]
        node = guest.memory.node
        left = node[batch.units].copy()
        slower = self._ns[number][left] / self._nearest[number]
        seconds = self._host.batch_s + float(slower.sum()) * UNIT / self._host.bandwidth * sharing
        for one, count in zip(*np.unique(left, return_counts=True), strict=True):
            self.free[int(one)] += int(count)
        self.free[to] -= batch.units.size
        node[batch.units] = to
        guest.rests.moved(batch.units, left, to, now)
        if batch.leave.size:
            # Each takes the place of one that came.
            places = left[-batch.leave.size :]
            seconds += float(slower[-batch.leave.size :].sum()) * UNIT / self._host.bandwidth * sharing
            guest.rests.moved(batch.leave, np.full(batch.leave.size, to, dtype=np.int16), int(places[0]), now)
            node[batch.leave] = places
            for one, count in zip(*np.unique(places, return_counts=True), strict=True):
                self.free[int(one)] -= int(count)
            self.free[to] += batch.leave.size
        self._moved += batch.units.size
        self._left += batch.leave.size
        return seconds

    def _shares(self) -> tuple[float, float]:
        heat = np.array([guest.memory.heat.sum() for guest in self._guests])
        local = [local_share(guest.memory, to) for guest, to in zip(self._guests, self.to, strict=True)]
        ns = 0.0
        for row, guest in zip(self._ns, self._guests, strict=True):
            there = guest.memory.node != ABSENT
            ns += float((guest.memory.heat[there] * row[guest.memory.node[there]]).sum())
        total = float(heat.sum()) or 1.0
        return float((heat * local).sum()) / total, ns / total

    def run(self, until: float, step: float, period: float) -> Outcome:
        """Go on for ``until`` seconds; heat is known anew, and ``step`` told of, every so many seconds.

        :param period: seconds of each row of the recordings.
        """
        outcome = Outcome([], [], [], [], [], self.to)
        due = [(0.0, number) for number in range(len(self._guests))]
        frame, told = 0, 0
        while told * step <= until:
            at, number = due[0] if due else (float("inf"), -1)
            if (frame + 1) * period <= min(at, told * step):
                frame += 1
                now = frame * period
                busy = {one for _, one in due}
                for one, guest in enumerate(self._guests):
                    guest.see(frame)
                    guest.mover.plan(guest.memory, guest.rests.resting(now))
                    if one not in busy:
                        heapq.heappush(due, (now, one))
            elif told * step <= at:
                local, ns = self._shares()
                outcome.times.append(told * step)
                outcome.local.append(local)
                outcome.latency.append(ns)
                outcome.moved.append(self._moved)
                outcome.left.append(self._left)
                told += 1
            else:
                heapq.heappop(due)
                mover = self._guests[number].mover
                mover.free = self.free[self.to[number]]
                batch = mover.next(at)
                if batch is None:
                    continue
                sharing = 1 + sum(self.to[one] == self.to[number] for _, one in due)
                seconds = self._move(number, batch, at, sharing) if batch.units.size else batch.wait
                heapq.heappush(due, (at + seconds, number))
        return outcome
