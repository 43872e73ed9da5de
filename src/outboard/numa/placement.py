"""Which processor each vCPU should run on.

The expected time of one of a vCPU's accesses beyond its core's own caches, on a processor of core c:

    miss x (sum over nodes n of share(n) x latency(c, n))  +  (1 - miss) x CACHE_NS  +  penalty(c, tenants before it)

* share(n): the part of its working set that is on node n. latency(c, n) lies between idle and loaded as measured, by
  how much of n's bandwidth is in use. That use does not depend on the placement: memory stays where it is, and who asks
  for it asks as much from elsewhere.
* miss: 1 - room / working set, at least MISS_FLOOR. Room is the last-level cache that is left over, shared evenly
  among the vCPUs that come to each cache on average. So a small working set makes the first term small and
  the vCPU may go anywhere; a large one makes the vCPU stick to its memory.
* penalty: whoever comes second to a core, beside its SMT sibling, pays SMT x a local access; whoever shares a processor
  pays, for each before it, QUEUE x the slowest access of the host. Tasks that are not ours came first. Waiting for a
  processor thus always costs more than any distance.

The cost of a placement is the sum of these times, each by the vCPU's rate of accesses. What a tenant pays grows
with those before it, so the cheapest placement is an assignment of vCPUs to slots, each core's slots filled from the
first: solved exactly up to EXACT, by auction within BOUND of the optimum above that.

Not in the model: traffic between nodes that share a link, and pages shared by vCPUs that are placed apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import UsageError
from outboard.numa.assignment import auction, exact
from outboard.numa.topology import Topology

CACHE_NS = 20.0
MISS_FLOOR = 0.02
SMT, QUEUE = 0.4, 2.0
EXACT = 256
"""vCPUs; beyond, an auction takes less time."""
BOUND = 0.05
_STAY_NS = 0.5
"""What a processor must be better by, so that a vCPU does not move for nothing."""


class Vcpu(msgspec.Struct, frozen=True):
    """A vCPU; ``working_set``: bytes of it on each node, in the topology's order; ``rate``: accesses, in any unit.

    ``processor`` is where it runs now; -1: nowhere yet.
    """

    guest: str
    number: int
    working_set: list[int]
    rate: float = 1.0
    processor: int = -1


class Load(msgspec.Struct, frozen=True):
    """What others do to the host.

    :param running: tasks that run or wait on a processor; ours are not among them.
    :param bandwidth: the part of each node's that is in use, 0 to 1; empty: none.
    :param cache: the part of a last-level cache that others hold, by its first processor.
    """

    running: dict[int, int] = {}
    bandwidth: list[float] = []
    cache: dict[int, float] = {}


class Placement(NamedTuple):
    """The processor of each vCPU and the expected ns of its accesses there; costs are weighted by rates.

    ``bound``: the cost is at most this part above the least there is, not counting that a vCPU stays where it is rather
    than gain half a nanosecond. ``now``: what the present one costs; infinite
    where a vCPU runs nowhere yet.
    """

    processors: list[int]
    expected: list[float]
    cost: float
    now: float
    bound: float


class _Slots(NamedTuple):
    """For each slot its processor, the row of its core's latencies, and the penalty in ns."""

    processors: list[int]
    cores: NDArray[np.int64]
    penalties: NDArray[np.float64]


class Model:
    """The model above, of one host under one load.

    :param others: vCPUs that share the caches and are not among those asked about; ``load`` has what they run on.
    :raise UsageError: ``load`` does not fit the host.

    Synchronization: none; nothing changes after it is made.
    """

    def __init__(self, topology: Topology, load: Load, others: int = 0) -> None:
        self.topology, self.load, self.others = topology, load, others
        bandwidth = np.array(load.bandwidth or [0.0] * len(topology.nodes))
        if bandwidth.shape != (len(topology.nodes),) or not ((bandwidth >= 0) & (bandwidth <= 1)).all():
            raise UsageError(
                f"the load names the bandwidth {load.bandwidth} of {len(topology.nodes)} nodes; give 0 to 1"
            )
        latencies = topology.estimated()
        idle, loaded = np.array(latencies.idle), np.array(latencies.loaded)
        rows = idle + (loaded - idle) * bandwidth
        self._threads: dict[int, list[int]] = {}
        for one in topology.processors:
            self._threads.setdefault(one.core, []).append(one.number)
        self._core_of = {thread: row for row, threads in enumerate(self._threads.values()) for thread in threads}
        # Threads of a core are equally far from everything; what measurements make of it is noise.
        cores = np.array([self._core_of[one.number] for one in topology.processors])
        count = np.bincount(cores)
        self._latency = np.stack([np.bincount(cores, column) / count for column in rows.T], axis=1)
        size = {cache.first: cache.size * (1 - load.cache.get(cache.first, 0.0)) for cache in topology.caches}
        self._room = np.zeros(len(self._threads))
        for one in topology.processors:
            self._room[self._core_of[one.number]] = size.get(one.cache, 0.0)
        self._smt = SMT * statistics.median(rows.min(axis=1))
        self._queue = QUEUE * float(rows.max())

    def accesses(self, vcpus: Sequence[Vcpu]) -> NDArray[np.float64]:
        """ns of an access of each vCPU on each core, without penalties.

        :raise UsageError: a working set is not of this host's nodes.
        """
        sets = np.array([one.working_set for one in vcpus], dtype=np.float64).reshape(len(vcpus), -1)
        if sets.shape[1] != len(self.topology.nodes) or (sets < 0).any():
            raise UsageError(f"a working set is not one size for each of {len(self.topology.nodes)} nodes")
        total = sets.sum(axis=1)
        # Of one whose working set is not known, memory is taken to be everywhere alike.
        shares = np.where(total[:, None] > 0, sets / np.maximum(total, 1)[:, None], 1 / sets.shape[1])
        tenants = max(1.0, (len(vcpus) + self.others) / max(1, len(self.topology.caches)))
        miss = 1 - self._room[None, :] / tenants / np.maximum(total, 1)[:, None]
        miss = np.clip(miss, MISS_FLOOR, 1)
        return np.asarray(miss * (shares @ self._latency.T) + (1 - miss) * CACHE_NS)

    def _penalty(self, running: dict[int, int], processor: int, threads: list[int]) -> float:
        beside = any(running[one] for one in threads if one != processor)
        return self._queue * running[processor] + (self._smt if beside else 0)

    def _slots(self, depth: int) -> _Slots:
        """The slots of each core, the cheapest first, ``depth`` for each of its threads."""
        processors, cores, penalties = [], [], []
        for row, threads in enumerate(self._threads.values()):
            running = {one: self.load.running.get(one, 0) for one in threads}
            for _ in range(depth * len(threads)):
                one = min(threads, key=lambda thread: (running[thread], thread))
                processors.append(one)
                cores.append(row)
                penalties.append(self._penalty(running, one, threads))
                running[one] += 1
        return _Slots(processors, np.array(cores), np.array(penalties))

    def expected(self, vcpus: Sequence[Vcpu], processors: Sequence[int]) -> list[float]:
        """ns of an access of each vCPU if it ran there; of those on one core, the one with fewer accesses pays for it.

        :raise UsageError: there is no such processor.
        """
        accesses = self.accesses(vcpus)
        running = {one.number: self.load.running.get(one.number, 0) for one in self.topology.processors}
        cores = list(self._threads.values())
        found = [0.0] * len(vcpus)
        # As the cheapest assignment has it; or else equal placements would seem to differ.
        for row in sorted(range(len(vcpus)), key=lambda row: -vcpus[row].rate):
            processor = processors[row]
            if processor not in self._core_of:
                raise UsageError(
                    f"{vcpus[row].guest}'s vCPU {vcpus[row].number}: this host has no processor {processor}"
                )
            core = self._core_of[processor]
            found[row] = float(accesses[row, core]) + self._penalty(running, processor, cores[core])
            running[processor] += 1
        return found

    def place(self, vcpus: Sequence[Vcpu]) -> Placement:
        """The placement of least cost, or within BOUND of it.

        :raise UsageError: a vCPU does not fit this host.
        """
        if not vcpus:
            return Placement([], [], 0.0, 0.0, 0.0)
        threads = len(self._core_of)
        # So deep that nobody is better off deeper: a slot with fewer before it is left, and that outweighs distance.
        depth = -(-(len(vcpus) + sum(self.load.running.values())) // threads) + 1
        slots = self._slots(min(depth, len(vcpus)))
        accesses = self.accesses(vcpus)
        rates = np.array([one.rate for one in vcpus])
        if not ((rates > 0) & np.isfinite(rates)).all():
            raise UsageError("a vCPU's rate of accesses must be above zero")
        times = accesses[:, slots.cores] + slots.penalties
        here = np.array([one.processor for one in vcpus])[:, None] == np.array(slots.processors)[None, :]
        costs = (times - _STAY_NS * here) * rates[:, None]
        if len(vcpus) <= EXACT:
            columns, bound = exact(costs).columns, 0.0
        else:
            least = float(costs.min(axis=1).sum())
            columns, bound = auction(costs, BOUND * least / len(vcpus)).columns, BOUND
        each = times[np.arange(len(vcpus)), columns]
        return Placement(
            [slots.processors[column] for column in columns],
            each.tolist(),
            float((each * rates).sum()),
            self._now(vcpus),
            bound,
        )

    def _now(self, vcpus: Sequence[Vcpu]) -> float:
        if any(one.processor < 0 for one in vcpus):
            return float("inf")
        times = self.expected(vcpus, [one.processor for one in vcpus])
        return sum(one.rate * ns for one, ns in zip(vcpus, times, strict=True))

    def reasons(self, vcpus: Sequence[Vcpu], placement: Placement) -> list[str]:
        """Why each vCPU goes where it goes, in words."""
        node_of = {one.number: one.node for one in self.topology.processors}
        accesses = self.accesses(vcpus)
        nodes = [node.number for node in self.topology.nodes]
        placed = all(one.processor >= 0 for one in vcpus)
        before = self.expected(vcpus, [one.processor for one in vcpus]) if placed else []
        words = []
        for row, (one, processor) in enumerate(zip(vcpus, placement.processors, strict=True)):
            total, most = sum(one.working_set), int(np.argmax(one.working_set))
            spread = float(accesses[row].max() - accesses[row].min())
            if not total:
                why = "what it uses is not known"
            elif spread < 0.1 * float(accesses[row].min()):
                why = f"it is as fast everywhere, within {spread:.0f} ns an access"
            elif node_of[processor] == nodes[most]:
                why = f"{one.working_set[most] / total:.0%} of what it uses is on that node"
            else:
                share = one.working_set[most] / total
                why = f"{share:.0%} of what it uses is on node {nodes[most]}, which is taken or far"
            where = f"processor {processor} of node {node_of[processor]}"
            if one.processor == processor:
                what = f"stays on {where}, {placement.expected[row]:.0f} ns an access"
            elif placed:
                what = f"goes to {where}, {before[row]:.0f} to {placement.expected[row]:.0f} ns an access"
            else:
                what = f"goes to {where}, {placement.expected[row]:.0f} ns an access"
            words.append(f"{one.guest}'s vCPU {one.number} {what}: {why}")
        return words
