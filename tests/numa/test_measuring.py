"""Latencies of this machine: how long they are nobody knows, that they were measured can be seen."""

from __future__ import annotations

import os

import msgspec
import numpy as np
import pytest

from outboard.errors import OutboardError
from outboard.numa import measuring
from outboard.numa.topology import read_topology


def test_each_processor_and_node_is_measured() -> None:
    before = os.sched_getaffinity(0)
    topology, seen = read_topology(), []
    found = measuring.measure(topology, np.random.default_rng(1), 4 << 20, lambda *pair: seen.append(pair))
    assert seen == [(node.number, one.number) for node in topology.nodes for one in topology.processors]
    latencies = found.latencies
    assert latencies is not None
    assert all(0 < ns < 1e9 for rows in (latencies.idle, latencies.loaded) for row in rows for ns in row)
    assert os.sched_getaffinity(0) == before


def test_a_chase_visits_every_line_once() -> None:
    buffer = measuring._Buffer(0, 1 << 20, np.random.default_rng(2), bound=False)
    lines, at, seen = (1 << 20) // 64, 0, set()
    for _ in range(lines):
        seen.add(at)
        at = int(buffer.words[at])
    assert (len(seen), at) == (lines, 0)
    buffer.close()


def test_more_memory_than_there_is_is_refused() -> None:
    with pytest.raises(OutboardError, match="no 1152921504606846976 bytes"):
        measuring.measure(read_topology(), np.random.default_rng(), 1 << 60)


def test_a_processor_that_is_not_there_is_named() -> None:
    topology = read_topology()
    more = msgspec.structs.replace(topology.processors[0], number=9999)
    with pytest.raises(OutboardError, match=r"from processors \[9999\]"):
        measuring.measure(
            msgspec.structs.replace(topology, processors=[*topology.processors, more]), np.random.default_rng(), 4 << 20
        )
