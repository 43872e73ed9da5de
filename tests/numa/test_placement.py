"""Placements: the least there is on every topology, and the reasons for them."""

from __future__ import annotations

from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outboard.errors import UsageError
from outboard.numa import placement
from outboard.numa.placement import Load, Model, Vcpu
from tests.support.topologies import NAMES, recorded

GIB = 1 << 30


def vcpus_of(seed: int, count: int, nodes: int, processors: list[int]) -> list[Vcpu]:
    random = np.random.default_rng(seed)
    sizes = 2.0 ** random.uniform(20, 36, count)
    shares = random.dirichlet([0.4] * nodes, count)
    return [
        Vcpu(
            f"vm-{row % 3}",
            row,
            (sizes[row] * shares[row]).astype(np.int64).tolist(),
            float(random.uniform(0.1, 4)),
            int(random.choice(processors)),
        )
        for row in range(count)
    ]


def load_of(seed: int, nodes: int, processors: list[int]) -> Load:
    random = np.random.default_rng(seed)
    busy = {int(one): int(random.integers(1, 3)) for one in random.choice(processors, len(processors) // 4)}
    return Load(busy, random.uniform(0, 1, nodes).tolist())


def cost(model: Model, vcpus: list[Vcpu], processors: list[int]) -> float:
    return sum(one.rate * ns for one, ns in zip(vcpus, model.expected(vcpus, processors), strict=True))


@given(st.integers(0, 2**32), st.integers(1, 3), st.sampled_from(["one", "asymmetric"]), st.booleans())
@settings(max_examples=12)
def test_no_other_placement_costs_less(seed: int, count: int, name: str, loaded: bool) -> None:
    topology = recorded(name)
    processors = [one.number for one in topology.processors]
    vcpus = vcpus_of(seed, count, len(topology.nodes), processors)
    model = Model(topology, load_of(seed, len(topology.nodes), processors) if loaded else Load())
    found = model.place(vcpus)
    least = min(cost(model, vcpus, list(choice)) for choice in product(processors, repeat=count))
    assert found.cost <= least + placement._STAY_NS * sum(one.rate for one in vcpus) + 1e-6
    assert found.cost >= least - 1e-6


@given(st.integers(0, 2**32), st.integers(1, 16), st.sampled_from(NAMES), st.booleans())
@settings(max_examples=40)
def test_an_auction_is_near_the_optimum(seed: int, count: int, name: str, loaded: bool) -> None:
    topology = recorded(name)
    processors = [one.number for one in topology.processors]
    vcpus = vcpus_of(seed, count, len(topology.nodes), processors)
    model = Model(topology, load_of(seed, len(topology.nodes), processors) if loaded else Load())
    best = model.place(vcpus)
    assert best.bound == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "EXACT", 0)
        quick = model.place(vcpus)
    slack = placement._STAY_NS * sum(one.rate for one in vcpus)
    assert quick.bound == placement.BOUND
    assert best.cost - slack - 1e-6 <= quick.cost <= best.cost * (1 + placement.BOUND) + slack + 1e-6


def test_nobody_waits_while_a_processor_is_free() -> None:
    topology = recorded("two")
    vcpus = [Vcpu("vm", row, [8 * GIB, 0]) for row in range(32)]
    found = Model(topology, Load()).place(vcpus)
    assert sorted(found.processors) == [one.number for one in topology.processors]


def test_the_large_stick_and_the_small_make_room() -> None:
    topology = recorded("two")
    near = [one.number for one in topology.processors if one.node == 0]
    large = [Vcpu("large", row, [16 * GIB, 0]) for row in range(8)]
    small = [Vcpu("small", row, [256 << 10, 0]) for row in range(8)]
    model = Model(topology, Load())
    found = model.place([*small, *large])
    assert all(one in near for one in found.processors[8:])
    assert not any(one in near for one in found.processors[:8])
    words = model.reasons([*small, *large], found)
    assert words[0].startswith("small's vCPU 0 goes to processor")
    assert "as fast everywhere" in words[0]
    assert words[8].endswith("100% of what it uses is on that node")


def test_memory_without_processors_is_used_from_the_nearest() -> None:
    topology = recorded("cxl")
    vcpu = Vcpu("vm", 0, [0, 0, 32 * GIB], processor=6)
    model = Model(topology, Load())
    found = model.place([vcpu])
    node = {one.number: one.node for one in topology.processors}
    assert node[found.processors[0]] == 0
    assert found.cost < found.now
    assert "on node 2, which is taken or far" in model.reasons([vcpu], found)[0]


def test_bandwidth_in_use_makes_a_node_slower_for_all() -> None:
    topology = recorded("four")
    vcpu = [Vcpu("vm", 0, [4 * GIB, 0, 0, 0])]
    idle, busy = (Model(topology, Load(bandwidth=[use, 0, 0, 0])).accesses(vcpu) for use in (0, 1))
    assert (busy > idle * 1.3).all()


def test_who_is_where_it_should_be_stays() -> None:
    topology = recorded("eight")
    vcpus = [Vcpu("vm", row, [GIB if node == row else 0 for node in range(8)], processor=row * 8) for row in range(8)]
    model = Model(topology, Load())
    found = model.place(vcpus)
    again = model.place(
        [Vcpu(v.guest, v.number, v.working_set, v.rate, p) for v, p in zip(vcpus, found.processors, strict=True)]
    )
    assert again.processors == found.processors
    assert again.now == pytest.approx(again.cost)
    assert (
        "stays on processor" in model.reasons(vcpus, model.place(vcpus))[0]
        or vcpus[0].processor not in found.processors
    )


@given(st.integers(0, 2**32), st.integers(2, 16), st.sampled_from(NAMES))
@settings(max_examples=20)
def test_a_placement_costs_the_same_when_it_is_there(seed: int, count: int, name: str) -> None:
    topology = recorded(name)
    vcpus = vcpus_of(seed, count, len(topology.nodes), [one.number for one in topology.processors])
    model = Model(topology, Load())
    found = model.place(vcpus)
    there = [msgspec.structs.replace(v, processor=p) for v, p in zip(vcpus, found.processors, strict=True)]
    slack = 2 * placement._STAY_NS * sum(one.rate for one in vcpus)
    assert model.place(there).now == pytest.approx(found.cost, abs=slack)


def test_nothing_to_place_costs_nothing() -> None:
    assert Model(recorded("one"), Load()).place([]).processors == []


@pytest.mark.parametrize(
    ("load", "vcpu", "words"),
    [
        (Load(bandwidth=[2.0, 0.0]), Vcpu("vm", 0, [1, 1]), "give 0 to 1"),
        (Load(bandwidth=[0.0]), Vcpu("vm", 0, [1, 1]), "give 0 to 1"),
        (Load(), Vcpu("vm", 0, [1]), "one size for each of 2 nodes"),
        (Load(), Vcpu("vm", 0, [1, -1]), "one size for each of 2 nodes"),
        (Load(), Vcpu("vm", 0, [1, 1], rate=0), "above zero"),
        (Load(), Vcpu("vm", 3, [1, 1], processor=400), "vm's vCPU 3: this host has no processor 400"),
    ],
)
def test_what_does_not_fit_the_host_is_refused(load: Load, vcpu: Vcpu, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Model(recorded("two"), load).place([vcpu])
