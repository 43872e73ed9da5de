"""A host as placement sees it: nodes, processors, caches, and what an access from here to there takes.

A topology is read from the running kernel or from a file that holds one, so that a decision can be made again where it
was not made. Latencies are nanoseconds of one access that misses every cache. Where none were measured they are guessed
from the firmware's distances, of which it says no more than that 10 is local.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from outboard.errors import SpecError
from outboard.linux import nodes as sysfs

LOCAL_NS = 90.0
"""A local access of a server of these years, where it was not measured."""
_LOADED = 2.0
"""How much slower an access is beside streams that fill the node's bandwidth, where it was not measured."""
_LOCAL_DISTANCE, _REMOTE_DISTANCE = 10, 20
_MOST_PROCESSORS, _MOST_NODES = 8192, 1024


class Node(msgspec.Struct, frozen=True):
    """A node; ``memory`` in bytes; ``distances`` to every node, in the order of the topology's nodes."""

    number: int
    processors: list[int]
    memory: int
    distances: list[int]


class Processor(msgspec.Struct, frozen=True):
    """A processor; ``core`` and ``cache``: the lowest number of those that share its core, and its last-level cache."""

    number: int
    node: int
    package: int
    core: int
    cache: int


class Cache(msgspec.Struct, frozen=True):
    """A last-level cache, ``size`` in bytes; ``first`` is the lowest number of the processors that share it."""

    first: int
    level: int
    size: int


class Latencies(msgspec.Struct, frozen=True):
    """ns of an access, a row for each processor, a column for each node; ``loaded``: its bandwidth is in use."""

    processors: list[int]
    nodes: list[int]
    idle: list[list[float]]
    loaded: list[list[float]]


class Topology(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-topology.v1"):
    """A host. Nodes and processors are in the order of their numbers."""

    nodes: list[Node]
    processors: list[Processor]
    caches: list[Cache]
    latencies: Latencies | None = None

    def estimated(self) -> Latencies:
        """Latencies as measured, or else as the distances suggest."""
        if self.latencies is not None:
            return self.latencies
        column = {node.number: index for index, node in enumerate(self.nodes)}
        away = {node.number: [LOCAL_NS * one / _LOCAL_DISTANCE for one in node.distances] for node in self.nodes}
        idle = [away[one.node] for one in self.processors]
        # The link to another node is slower to begin with, and queues at the same memory.
        loaded = [
            [ns + (_LOADED - 1) * away[one.node][column[one.node]] for ns in row]
            for one, row in zip(self.processors, idle, strict=True)
        ]
        return Latencies([one.number for one in self.processors], list(column), idle, loaded)

    def same_machine(self, other: Topology) -> bool:
        """Whether nodes, processors and caches are the same, so that what was measured on one holds for the other."""
        return [node.number for node in self.nodes] == [node.number for node in other.nodes] and (
            self.processors == other.processors and self.caches == other.caches
        )

    def between_nodes(self, *, loaded: bool = False) -> list[list[float]]:
        """The median latency from the processors of each node that has some to every node, both in order."""
        latencies = self.estimated()
        rows = dict(zip(latencies.processors, latencies.loaded if loaded else latencies.idle, strict=True))
        return [
            [statistics.median(rows[one][column] for one in node.processors) for column in range(len(self.nodes))]
            for node in self.nodes
            if node.processors
        ]


def read_topology(system: Path = sysfs.SYSTEM) -> Topology:
    """This host's topology, without latencies; a kernel without NUMA is one node.

    :raise KernelError: sysfs could not be read.
    """
    found = sysfs.nodes(system)
    present = sysfs.processors(system)
    online = {one.number for one in present}
    if not found:
        found = [sysfs.NodeFacts(0, tuple(sorted(online)), 0, 0, (_LOCAL_DISTANCE,))]
    nodes = []
    for index, node in enumerate(found):
        distances = list(node.distances)
        if len(distances) != len(found):
            distances = [_LOCAL_DISTANCE if other == index else _REMOTE_DISTANCE for other in range(len(found))]
        nodes.append(Node(node.number, [one for one in node.processors if one in online], node.memory, distances))
    of = {one: node.number for node in nodes for one in node.processors}
    processors, caches = [], {}
    for one in present:
        last = max((cache for cache in one.caches if cache.kind != "Instruction"), default=None)
        shared = one.number if last is None else min(last.processors)
        if last is not None:
            caches[shared] = Cache(shared, last.level, last.size)
        node_number = of.get(one.number, nodes[0].number)
        processors.append(Processor(one.number, node_number, one.package, min(one.siblings), shared))
    return Topology(nodes, processors, [caches[first] for first in sorted(caches)])


def _check(topology: Topology) -> str:
    """What is wrong with a topology, or nothing."""
    nodes = [node.number for node in topology.nodes]
    numbers = [one.number for one in topology.processors]
    if not nodes or not numbers or len(nodes) > _MOST_NODES or len(numbers) > _MOST_PROCESSORS:
        return f"it has {len(nodes)} nodes and {len(numbers)} processors"
    if nodes != sorted(set(nodes)) or numbers != sorted(set(numbers)):
        return "nodes and processors must be in the order of their numbers, each once"
    listed = {one: node.number for node in topology.nodes for one in node.processors}
    if listed != {one.number: one.node for one in topology.processors}:
        return "the nodes' processors are not the processors' nodes"
    for node in topology.nodes:
        if node.memory < 0 or len(node.distances) != len(nodes) or min(node.distances) < _LOCAL_DISTANCE:
            return f"node {node.number} needs a distance of at least {_LOCAL_DISTANCE} to each of {len(nodes)} nodes"
    if any(cache.size <= 0 for cache in topology.caches):
        return "a cache has no size"
    return "" if topology.latencies is None else _check_latencies(topology, topology.latencies)


def _check_latencies(topology: Topology, latencies: Latencies) -> str:
    if latencies.processors != [one.number for one in topology.processors]:
        return "its latencies are of other processors"
    if latencies.nodes != [node.number for node in topology.nodes]:
        return "its latencies are of other nodes"
    for rows in (latencies.idle, latencies.loaded):
        if len(rows) != len(latencies.processors) or any(len(row) != len(latencies.nodes) for row in rows):
            return "its latencies are not one for each processor and node"
        if not all(0 < ns < 1e9 for row in rows for ns in row):
            return "a latency is not between 0 and 1 s"
    return ""


def load(path: Path) -> Topology:
    """A topology from a file.

    :raise SpecError: it cannot be read, or is none.
    """
    try:
        topology = msgspec.json.decode(path.read_bytes(), type=Topology)
    except OSError as error:
        raise SpecError(f"cannot read the topology {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise SpecError(f"{path} is no topology: {error}; outboard numa topology -o json prints one") from error
    wrong = _check(topology)
    if wrong:
        raise SpecError(f"{path} is no topology: {wrong}; outboard numa topology -o json prints one")
    return topology


def keep(topology: Topology, path: Path) -> None:
    """Write a topology to a file, whole or not at all.

    :raise OSError: it could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(topology)))
    draft.replace(path)


def with_kept(topology: Topology, path: Path) -> Topology:
    """A topology with the latencies that were kept of the same machine, if they were.

    :raise SpecError: what was kept cannot be read.
    """
    if not path.exists():
        return topology
    try:
        kept = load(path)
    except SpecError as error:
        raise SpecError(f"{error}; outboard numa topology --measure makes it anew") from error
    return msgspec.structs.replace(topology, latencies=kept.latencies) if kept.same_machine(topology) else topology
