"""A running guest as placement sees it: its vCPUs with the memory that they use; and what that means for its threads.

Which vCPU touches which page is not known from outside: each is taken to use an even part of what the guest uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outboard.numa.placement import Vcpu
from outboard.numa.policies import ABSENT, Memory
from outboard.numa.residents import Resident
from outboard.numa.topology import Topology

_HOT = 0.95
_LEAST_RATE = 0.01
_COPIED = 2e9
"""Bytes/s that memory follows at, for the price of a move; a server of these years copies as much on one core."""


def working_set(memory: Memory, topology: Topology, unit_bytes: int) -> list[int]:
    """Bytes on each node, in the topology's order, of the units that have nearly all of the accesses."""
    hottest = np.argsort(-memory.heat, kind="stable")
    share = np.cumsum(memory.heat[hottest])
    if not share.size or share[-1] <= 0:
        return [0] * len(topology.nodes)
    used = memory.node[hottest[: int(np.searchsorted(share, _HOT * share[-1])) + 1]]
    used = used[used != ABSENT]
    return [int(np.count_nonzero(used == node.number)) * unit_bytes for node in topology.nodes]


def vcpus_of(name: str, residents: Sequence[Resident], working_set: Sequence[int]) -> list[Vcpu]:
    """The guest's vCPUs; an idle one counts little, not nothing."""
    mine = [one for one in residents if one.role == "vcpu"]
    part = [size // max(1, len(mine)) for size in working_set]
    return [Vcpu(name, one.number, part, max(_LEAST_RATE, one.busy), one.processor) for one in mine]


def bindings(topology: Topology, residents: Sequence[Resident], processors: Sequence[int]) -> dict[int, list[int]]:
    """The processors of each thread's node; emulator and I/O threads go where most of the vCPUs' work is.

    :param processors: of the vCPUs, in their order.
    """
    node_of = {one.number: one.node for one in topology.processors}
    of = {node.number: node.processors for node in topology.nodes}
    mine = [one for one in residents if one.role == "vcpu"]
    wanted, weight = {}, dict.fromkeys(of, 0.0)
    for one, processor in zip(mine, processors, strict=True):
        wanted[one.tid] = of[node_of[processor]]
        weight[node_of[processor]] += max(_LEAST_RATE, one.busy)
    most = max(weight, key=lambda node: (weight[node], -node))
    return wanted | {one.tid: of[most] for one in residents if one.role != "vcpu"}


def price(memory: Memory, unit_bytes: int, nodes: Sequence[int]) -> float:
    """Seconds that memory in use takes to follow to nodes."""
    away = (memory.heat > 0) & (memory.node != ABSENT) & ~np.isin(memory.node, nodes)
    return float(np.count_nonzero(away)) * unit_bytes / _COPIED
