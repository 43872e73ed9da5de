"""Topologies, of this kernel and from files; what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from outboard.errors import SpecError
from outboard.numa import topology
from tests.support.topologies import NAMES, recorded


def system(root: Path, *, numa: bool) -> Path:
    """A sysfs of four processors, two cores, a node without processors among three."""
    (root / "cpu").mkdir(parents=True)
    (root / "cpu" / "online").write_text("0-3\n")
    for number in range(4):
        cpu = root / "cpu" / f"cpu{number}"
        for index, (level, kind, size, shared) in enumerate(
            (("1", "Data", "32K", f"{number}"), ("3", "Unified", "16M", "0,2" if number % 2 == 0 else "1,3"))
        ):
            cache = cpu / "cache" / f"index{index}"
            cache.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (cache / name).write_text(text + "\n")
        (cpu / "topology").mkdir()
        (cpu / "topology" / "thread_siblings_list").write_text("0,2\n" if number % 2 == 0 else "1,3\n")
        (cpu / "topology" / "physical_package_id").write_text("-1\n")
    if numa:
        (root / "node").mkdir()
        (root / "node" / "online").write_text("0,2-3\n")
        for number, cpus, distances in ((0, "0,2", "10 20 17"), (2, "1,3", "20 10 28"), (3, "", "17 28 10")):
            node = root / "node" / f"node{number}"
            node.mkdir()
            (node / "cpulist").write_text(cpus + "\n")
            (node / "distance").write_text(distances + "\n")
            (node / "meminfo").write_text(f"Node {number} MemTotal: 1024 kB\nNode {number} MemFree: 512 kB\n")
    return root


def test_a_kernel_is_read(tmp_path: Path) -> None:
    found = topology.read_topology(system(tmp_path, numa=True))
    assert [(node.number, node.processors, node.memory) for node in found.nodes] == [
        (0, [0, 2], 1 << 20),
        (2, [1, 3], 1 << 20),
        (3, [], 1 << 20),
    ]
    assert [(one.node, one.core, one.cache, one.package) for one in found.processors] == [
        (0, 0, 0, 0),
        (2, 1, 1, 0),
        (0, 0, 0, 0),
        (2, 1, 1, 0),
    ]
    assert found.caches == [topology.Cache(0, 3, 16 << 20), topology.Cache(1, 3, 16 << 20)]
    assert found.between_nodes() == [[90, 180, 153], [180, 90, 252]]
    assert found.between_nodes(loaded=True) == [[180, 270, 243], [270, 180, 342]]


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    found = topology.read_topology(system(tmp_path, numa=False))
    assert [(node.number, node.processors, node.distances) for node in found.nodes] == [(0, [0, 1, 2, 3], [10])]


def test_this_machine_is_read_and_kept(tmp_path: Path) -> None:
    found = topology.read_topology()
    assert {one for node in found.nodes for one in node.processors} == {one.number for one in found.processors}
    measured = msgspec.structs.replace(found, latencies=found.estimated())
    path = tmp_path / "state" / "numa.json"
    assert topology.with_kept(found, path) == found
    topology.keep(measured, path)
    assert topology.with_kept(found, path) == measured
    (tmp_path / "damaged.json").write_text("{")
    with pytest.raises(SpecError, match="--measure makes it anew"):
        topology.with_kept(found, tmp_path / "damaged.json")
    other = msgspec.structs.replace(found, caches=[*found.caches, topology.Cache(99, 4, 1)])
    assert topology.with_kept(other, path) == other, "what was measured elsewhere does not hold here"


@pytest.mark.parametrize("name", NAMES)
def test_recorded_ones_load_again_as_they_are(name: str, tmp_path: Path) -> None:
    found = recorded(name)
    topology.keep(found, tmp_path / "again.json")
    assert topology.load(tmp_path / "again.json") == found
    rows = found.between_nodes()
    # A node's own memory is nearest, and a node without processors has no row.
    near = [row.index(min(row)) for row in rows]
    assert near == [index for index, node in enumerate(found.nodes) if node.processors]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"number":1,"node":0', '"number":1,"node":1', "not the processors' nodes"),
        ('"distances":[10,21]', '"distances":[10]', "node 0 needs a distance"),
        ('"distances":[10,21]', '"distances":[10,9]', "at least 10"),
        ('"number":1,"processors"', '"number":0,"processors"', "in the order"),
        ('"level":3,"size":25165824', '"level":3,"size":0', "no size"),
        ('"idle":[[', '"idle":[[-', "between 0 and 1 s"),
        ('"idle":[[', '"idle":[[1.0],[', "not one for each"),
        ('"nodes":[0,1]', '"nodes":[0,2]', "of other nodes"),
        ('"latencies":{"processors":[0,', '"latencies":{"processors":[9,', "of other processors"),
        ("outboard.numa-topology.v1", "outboard.other.v1", "Invalid value"),
        ('"processors":[{', '"processors":[],"x":[{', "0 processors"),
    ],
)
def test_what_is_damaged_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = msgspec.json.encode(recorded("two")).decode()
    assert old in text
    (tmp_path / "damaged.json").write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError, match=words):
        topology.load(tmp_path / "damaged.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.json: No such file"):
        topology.load(tmp_path / "none.json")
