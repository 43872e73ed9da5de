"""Hosts to decide for, made up after the distances and latencies of servers of each kind; none of them is a real one.

``one`` to ``eight`` have as many nodes; those of ``eight`` form a twisted ladder; ``asymmetric`` has nodes of several
sizes and distances that differ by direction; ``cxl`` has a node of memory without processors.
"""

from __future__ import annotations

from pathlib import Path

from outboard.numa.topology import Topology, load

NAMES = ("one", "two", "four", "eight", "asymmetric", "cxl")
_HERE = Path(__file__).parents[1] / "numa" / "topologies"


def recorded(name: str) -> Topology:
    """The topology of that name."""
    return load(_HERE / f"{name}.json")
