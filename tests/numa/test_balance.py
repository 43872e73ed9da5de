"""Proposals to guests, each judged as if nobody else moved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outboard.errors import UsageError
from outboard.numa.balance import proposals
from outboard.numa.placement import Load, Model, Vcpu
from outboard.numa.settling import Rules, Settler
from tests.support.topologies import NAMES, recorded

GIB = 1 << 30


def guest(name: str, node: int, processors: list[int]) -> list[Vcpu]:
    sizes = [8 * GIB if one == node else 0 for one in range(2)]
    return [Vcpu(name, number, sizes, processor=one) for number, one in enumerate(processors)]


def test_a_guest_far_from_its_memory_is_offered_its_node_and_one_at_home_nothing() -> None:
    vcpus = [*guest("far", 1, [0, 1]), *guest("home", 0, [2, 3])]
    found = proposals(recorded("two"), Load(), vcpus, {"far": 2.0})
    assert found["home"].offer.key == found["home"].offer.here == (0, 0)
    far = found["far"].offer
    assert (far.here, far.key, far.price) == ((0, 0), (1, 1), 2.0)
    assert far.then < 0.7 * far.now
    settler = Settler(Rules())
    assert not settler.consider(far, 0).move
    assert settler.consider(far, 10).move


def test_nobody_comes_to_where_others_run() -> None:
    vcpus = [*guest("a", 1, [0]), *guest("b", 0, [8])]
    found = proposals(recorded("two"), Load(), vcpus, {})
    assert found["a"].offer.key == (1,)
    assert found["a"].processors[0] not in (8, 24)
    assert found["b"].processors[0] not in (0, 16)
    assert all(one.offer.then < 0.7 * one.offer.now for one in found.values())


def test_full_nodes_are_left_alone() -> None:
    topology = recorded("two")
    here, there = ([one.number for one in topology.processors if one.node == node] for node in (0, 1))
    vcpus = [*guest("a", 1, here), *guest("b", 0, there)]
    placed = Model(topology, Load()).place(vcpus)
    assert placed.cost < 0.8 * placed.now, "together they would do well to change places"
    for one in proposals(topology, Load(), vcpus, {}).values():
        assert not Settler(Rules(hold=0)).consider(one.offer, 0).move


@given(st.integers(0, 2**32), st.sampled_from(NAMES))
@settings(max_examples=20)
def test_each_move_that_is_made_makes_the_whole_better(seed: int, name: str) -> None:
    topology, random = recorded(name), np.random.default_rng(seed)
    nodes, processors = len(topology.nodes), [one.number for one in topology.processors]
    shares = random.dirichlet([0.3] * nodes, 12) * 2.0 ** random.uniform(20, 34, (12, 1))
    vcpus = [
        Vcpu(f"vm-{row // 3}", row % 3, [int(part) for part in shares[row]], processor=int(random.choice(processors)))
        for row in range(12)
    ]
    model = Model(topology, Load())
    for _ in range(6):
        before = sum(model.expected(vcpus, [one.processor for one in vcpus]))
        found = proposals(topology, Load(), vcpus, {})
        name, best = min(found.items(), key=lambda item: item[1].offer.then - item[1].offer.now)
        if best.offer.then >= best.offer.now:
            break
        places = iter(best.processors)
        vcpus = [
            Vcpu(one.guest, one.number, one.working_set, processor=next(places) if one.guest == name else one.processor)
            for one in vcpus
        ]
        after = sum(model.expected(vcpus, [one.processor for one in vcpus]))
        assert before - after == pytest.approx(best.offer.now - best.offer.then)


def test_who_runs_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match="new's vCPU 0 runs nowhere yet"):
        proposals(recorded("two"), Load(), guest("new", 0, [-1]), {})
