"""Batches are carried out: in order, within the permitted stall, with what cannot be moved told apart. On a model."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.errors import NotFoundError, RefusedError
from outboard.linux import numa
from outboard.numa.following import Follower, Progress
from outboard.numa.moving import Limits, Mover, Pace, Rests
from outboard.numa.policies import ABSENT, POLICIES, UNKNOWN, Memory, Policy
from outboard.numa.warmth import watch
from outboard.numa.whereabouts import Whereabouts, _most, free_of, unit_of
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Model:
    """Two nodes; ``each`` seconds a unit; ``refuse``: units with what the kernel says of them, and how often."""

    def __init__(self, node: NDArray[np.int16], clock: Clock, each: float = 30e-6) -> None:
        self.node, self.clock, self.each = node.copy(), clock, each
        self.refuse: dict[int, tuple[int, int]] = {}
        self.calls: list[tuple[list[int], int]] = []
        self.asked: list[list[int]] = []
        self.probes = 0
        self.room = node.size
        self.before = 0.0

    def overhead(self) -> float:
        self.probes += 1
        self.clock.now += self.before
        return self.before

    def nodes(self, units: NDArray[np.int64]) -> NDArray[np.int16]:
        self.asked.append(units.tolist())
        return np.asarray(self.node[units])

    def move(self, units: NDArray[np.int64], node: int) -> tuple[NDArray[np.int32], float]:
        self.calls.append((units.tolist(), node))
        self.clock.now += self.each * units.size + self.before
        status: NDArray[np.int32] = np.full(units.size, node, dtype=np.int32)
        for row, unit in enumerate(units.tolist()):
            code, times = self.refuse.get(unit, (0, 0))
            if times:
                self.refuse[unit] = code, times - 1
                status[row] = -code
            elif node == 1 and np.count_nonzero(self.node == 1) >= self.room:
                status[row] = -errno.ENOMEM
            else:
                self.node[unit] = node
        return status, self.each * units.size + self.before


def follow(
    model: Model, memory: Memory, policy: Policy, free: int | None = None, longest: float = 0.02
) -> tuple[Follower, Progress]:
    mover = Mover(policy, 1, Limits(64, 1000), memory.node.size if free is None else free)
    follower = Follower(
        model, memory, mover, Pace(longest, 64, 4096), Rests(memory.node.size, 60), model.clock, model.clock.sleep
    )
    while follower.step():
        pass
    return follower, follower.progress()


def unknown(memory: Memory) -> Memory:
    return memory._replace(node=np.full(memory.node.size, UNKNOWN, dtype=np.int16))


def memory_of(units: int, seed: int = 1) -> Memory:
    random = np.random.default_rng(seed)
    heat = random.permutation(1 / np.arange(1, units + 1) ** 1.1)
    return Memory(heat, heat / 2, np.zeros(units, dtype=np.int16))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("until-local", "short-of-memory")])
def test_all_of_it_comes_in_batches_that_no_one_waits_for_longer_than_permitted(name: str) -> None:
    memory = memory_of(20_000)
    model = Model(memory.node, Clock())
    _, told = follow(model, memory, POLICIES[name])
    assert (model.node == 1).all()
    assert (told.moved, told.to_come, told.stayed, told.local) == (20_000, 0, {}, 1.0)
    assert 0.005 < told.longest <= 0.02
    assert told.batches == len(model.calls)


def test_what_each_call_takes_does_not_make_batches_small() -> None:
    memory = memory_of(20_000)
    model = Model(memory.node, Clock())
    model.before = 0.05
    _, told = follow(model, memory, POLICIES["hottest-first"])
    assert told.overhead == 0.05
    assert told.moved == 20_000
    assert told.batches < 100
    assert told.longest > 0.05
    assert told.stall <= 0.02


def test_a_call_whose_overhead_has_grown_does_not_make_batches_small() -> None:
    memory = memory_of(40_000)
    model = Model(memory.node, Clock())
    mover = Mover(POLICIES["hottest-first"], 1, Limits(), 40_000)
    pace = Pace(0.02, 64, 4096)
    follower = Follower(model, memory, mover, pace, Rests(40_000, 60), model.clock, model.clock.sleep)
    sizes = []
    for number in range(40):
        # As where the processors are taken by others for a while.
        model.before = 0.08 if 10 <= number < 30 else 0.001
        follower.step()
        sizes.append(pace.batch)
    assert min(sizes[9:]) >= 0.9 * sizes[9]
    assert sizes[-1] == pytest.approx(0.4 * 0.02 / 30e-6, abs=2)
    assert model.probes < 20
    assert follower.progress().stall <= 0.02


def test_nothing_is_asked_about_before_its_turn() -> None:
    memory = memory_of(5000)
    model = Model(memory.node, Clock())
    mover = Mover(POLICIES["hottest-first"], 1, Limits(), 5000)
    follower = Follower(
        model, unknown(memory), mover, Pace(0.02, 64, 4096), Rests(5000, 60), model.clock, model.clock.sleep
    )
    assert not model.asked
    follower.step()
    assert model.asked == [model.calls[0][0]] == [np.argsort(-memory.heat, kind="stable")[:64].tolist()]


@pytest.mark.parametrize("name", list(POLICIES))
def test_what_is_not_known_is_asked_and_moves_as_if_it_were(name: str) -> None:
    moved = []
    for hidden in (False, True):
        memory = memory_of(3000)
        memory.node[np.random.default_rng(2).permutation(3000)[:1500]] = 1
        memory.node[100:200] = ABSENT
        model = Model(memory.node, Clock())
        _, told = follow(model, unknown(memory) if hidden else memory, POLICIES[name], 2000)
        moved.append(([unit for units, _ in model.calls for unit in units], told.moved, told.to_come, told.local))
    assert moved[0] == moved[1]
    assert moved[0][1] > 0


def test_where_all_is_there_already_it_is_asked_about_in_few_calls() -> None:
    memory = memory_of(50_000)
    memory.node[:] = 1
    model = Model(memory.node, Clock())
    _, told = follow(model, unknown(memory), POLICIES["hottest-first"], free=0)
    assert not model.calls
    assert len(model.asked) < 15
    assert (told.moved, told.to_come, told.local) == (0, 0, 1.0)


def test_the_hottest_come_first() -> None:
    memory = memory_of(5000)
    model = Model(memory.node, Clock())
    follow(model, memory, POLICIES["hottest-first"])
    first = [unit for units, _ in model.calls for unit in units][:1000]
    assert sorted(first) == sorted(np.argsort(-memory.heat, kind="stable")[:1000].tolist())


def test_what_is_busy_is_tried_again_and_what_cannot_move_is_told() -> None:
    memory = memory_of(500)
    model = Model(memory.node, Clock())
    model.refuse = {7: (errno.EBUSY, 2), 8: (errno.EAGAIN, 1), 9: (errno.EACCES, 9), 10: (errno.EBUSY, 9)}
    _, told = follow(model, memory, POLICIES["hottest-first"])
    assert np.flatnonzero(model.node == 0).tolist() == [9, 10]
    assert told.stayed == {"shared with another process": 1, "in use by the kernel": 1}
    assert told.moved == 498
    assert sum(9 in units for units, _ in model.calls) == 1


def test_a_full_node_ends_it() -> None:
    memory = memory_of(1000)
    model = Model(memory.node, Clock())
    model.room = 300
    _, told = follow(model, memory, POLICIES["hottest-first"])
    assert told.moved == 300
    assert "no memory there" in told.stayed
    assert told.to_come > 0


def test_cold_ones_leave_before_hot_ones_come() -> None:
    memory = memory_of(400)
    memory.node[200:] = 1
    model = Model(memory.node, Clock())
    model.room = 200
    before = memory.heat[memory.node == 1].sum()
    _, told = follow(model, memory, POLICIES["short-of-memory"], free=0)
    assert told.left == told.moved > 0
    assert not told.stayed, "there was always room"
    assert memory.heat[model.node == 1].sum() > before
    assert (model.node == memory.node).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from(list(POLICIES)),
    st.integers(0, 300),
    st.dictionaries(st.integers(0, 299), st.tuples(st.sampled_from([errno.EBUSY, errno.EACCES]), st.integers(1, 5))),
    st.floats(1e-6, 0.5),
)
def test_whatever_happens_it_ends_and_knows_where_everything_is(
    units: int, name: str, free: int, refuse: dict[int, tuple[int, int]], each: float
) -> None:
    memory = memory_of(units, units)
    memory.node[: units // 3] = 1
    memory.node[units // 2 : units // 2 + 5] = -1
    model = Model(memory.node, Clock(), each)
    model.refuse = dict(refuse)
    follower, told = follow(model, memory, POLICIES[name], free)
    assert (model.node == follower.memory.node).all()
    assert (model.node[units // 2 : units // 2 + 5] == -1).all(), "what is nowhere is left alone"
    assert told.longest <= 0.02 or each > 0.02 / 64 / 1.6, "only the first batch can be too long"


def test_most_of_a_unit_says_where_it_is() -> None:
    rows = np.array([[0, 1, 1, -2], [-2, -2, -2, -2], [0, 0, 0, 1]], dtype=np.int32)
    assert _most(rows).tolist() == [1, -1, 0]


def test_a_real_process_is_where_it_is_and_keeps_its_content() -> None:
    require("root", "no-swap")
    with Target(mebibytes=8) as target, guest_of(target) as guest:
        assert unit_of(guest) == 1
        target.ask("g")
        memory = watch(guest, 1, 0.3)
        assert memory.heat.sum() > 0
        assert target.ask("s").startswith("bad 0 of ")
        target.ask("d 5 100")
        with Whereabouts(guest, 1) as where:
            with pytest.raises(RefusedError, match="traced already"):
                Whereabouts(guest, 1)
            nodes = where.nodes()
            assert (nodes >= 0).all(), "what the trace unmapped is mapped again"
            assert (where.nodes(np.array([5, 3])) == nodes[[5, 3]]).all()
            assert where.overhead() > 0
            status, took = where.move(np.arange(64), int(nodes[0]))
            assert (status == nodes[0]).all()
            assert took > 0
        with Whereabouts(guest, 512) as large:
            assert large.units == 4
            assert (large.nodes() == nodes[0]).all()
            assert (large.move(np.arange(4), int(nodes[0]))[0] == nodes[0]).all()
        assert target.ask("r 77").isdigit()


def test_what_was_never_written_is_nowhere_and_stays_so() -> None:
    require("root", "no-swap")
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        guest.memory.punch(10, 20)
        with Whereabouts(guest, 1) as where:
            nodes = where.nodes()
            assert np.flatnonzero(nodes == -1).tolist() == list(range(10, 30))
            assert where.move(np.array([10]), 0)[0].tolist() in ([-errno.ENOENT], [-errno.EFAULT])
        assert len(guest.memory.populated()) == target.pages - 20


def test_a_node_that_is_not_there_is_named() -> None:
    assert free_of(0) > 0
    with pytest.raises(NotFoundError, match="this host has no node 700 with memory: it has"):
        free_of(700)
    require("root")
    assert numa.migrate_pages(os.getpid(), 0, 0) == 0
