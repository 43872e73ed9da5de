"""What each policy moves, in which order, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.numa.moving import Limits, Mover
from outboard.numa.policies import ABSENT, POLICIES, Memory, Policy, local_share, worth_breaking


def memory_of(heat: list[float], node: list[int], writes: list[float] | None = None) -> Memory:
    written = [0.0] * len(heat) if writes is None else writes
    return Memory(np.array(heat), np.array(written), np.array(node, dtype=np.int16))


def moved(mover: Mover, now: float = 0.0) -> list[int]:
    """Every unit that is moved, in order; what is to be waited for is waited for."""
    found: list[int] = []
    while (batch := mover.next(now)) is not None:
        now += batch.wait
        found += batch.units.tolist()
    return found


def run(name: str, memory: Memory, to: int = 1, free: int = 1000, batch: int = 2) -> list[int]:
    mover = Mover(POLICIES[name], to, Limits(batch=batch, tail=4.0), free)
    mover.plan(memory)
    return moved(mover)


HEAT = [0.0, 5.0, 80.0, 1.0, 14.0, 0.0, 9.0]
NODE = [0, 0, 0, 0, 2, ABSENT, 1]


def test_the_hottest_go_first_and_the_untouched_last() -> None:
    assert run("hottest-first", memory_of(HEAT, NODE)) == [2, 4, 1, 3, 0]
    assert run("address", memory_of(HEAT, NODE)) == [0, 1, 2, 3, 4]


def test_urgent_ones_go_before_all_others() -> None:
    urgent = np.array([True, *[False] * 5, True])
    assert run("hottest-first", memory_of(HEAT, NODE)._replace(urgent=urgent)) == [0, 2, 4, 1, 3]


def test_the_written_go_before_the_read() -> None:
    writes = [0.0, 5.0, 1.0, 0.0, 0.0, 0.0, 9.0]
    assert run("writes-first", memory_of(HEAT, NODE, writes)) == [1, 2, 4, 3, 0]


def test_the_hot_set_goes_before_what_is_written_but_cold() -> None:
    policy = Policy("both", "", "writes", hot=0.9, tail="stay")
    memory = memory_of([50.0, 2.0, 45.0, 3.0], [0, 0, 0, 0], [0.0, 2.0, 1.0, 3.0])
    mover = Mover(policy, 1, Limits(batch=1), 9)
    mover.plan(memory)
    assert moved(mover) == [2, 0]


def test_the_tail_waits_for_its_rate() -> None:
    mover = Mover(POLICIES["hot-set"], 1, Limits(batch=1, tail=4.0), 1000)
    mover.plan(memory_of(HEAT, NODE))
    # 80, 14, 9 and 5 of 109 are the hot set; the 9 are there already. The tail begins at once, and then waits.
    at_once = [mover.next(0.0) for _ in range(4)]
    assert [batch.units.tolist() for batch in at_once if batch is not None] == [[2], [4], [1], [3]]
    waiting = mover.next(0.1)
    assert waiting is not None
    assert waiting.units.size == 0
    assert waiting.wait == pytest.approx(0.15)
    last = mover.next(0.25)
    assert last is not None
    assert last.units.tolist() == [0]
    assert mover.next(9.0) is None


def test_enough_is_enough() -> None:
    memory = memory_of(HEAT, NODE)
    assert run("until-local", memory, batch=1) == [2, 4]
    memory.node[[2, 4]] = 1
    assert local_share(memory, 1) == pytest.approx(103 / 109)
    assert run("until-local", memory) == []


def test_the_cold_make_room_for_the_hot_and_never_the_hot() -> None:
    memory = memory_of([9.0, 50.0, 30.0, 1.0, 2.0, 28.0], [0, 0, 0, 1, 1, 1])
    mover = Mover(POLICIES["short-of-memory"], 1, Limits(batch=8), 1)
    mover.plan(memory)
    batch = mover.next(0.0)
    assert batch is not None
    assert batch.units.tolist() == [1, 2, 0]
    assert batch.leave.tolist() == [3, 4]
    assert mover.free == 0
    full = Mover(POLICIES["short-of-memory"], 1, Limits(batch=8), 0)
    full.plan(memory_of([10.0, 20.0], [0, 1]))
    assert full.next(0.0) is None


def test_nothing_goes_where_there_is_no_room() -> None:
    assert run("hottest-first", memory_of(HEAT, NODE), free=3) == [2, 4, 1]


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(-1, 3), st.booleans()), min_size=1, max_size=60
    ),
    st.sampled_from(sorted(POLICIES)),
    st.integers(1, 9),
    st.integers(0, 60),
)
def test_no_policy_breaks_its_limits(
    units: list[tuple[float, float, int, bool]], name: str, batch: int, free: int
) -> None:
    heat, writes, node, rests = (list(column) for column in zip(*units, strict=True))
    memory = memory_of(heat, node, writes)
    mover = Mover(POLICIES[name], 1, Limits(batch=batch, tail=1.0), free)
    mover.plan(memory, np.array(rests, dtype=np.bool_))
    seen: set[int] = set()
    now, room = 0.0, free
    while (found := mover.next(now)) is not None:
        now += found.wait
        assert len(found.units) <= batch
        assert found.units.size or found.wait > 0
        for one in found.leave.tolist():
            assert node[one] == 1
            assert not rests[one]
            assert min(memory.heat[found.units]) > memory.heat[one]
        room -= found.units.size - found.leave.size
        assert room >= 0
        mine = set(found.units.tolist())
        assert not mine & seen
        assert all(node[one] not in (1, ABSENT) and not rests[one] for one in mine)
        seen |= mine
    movable = [one for one in range(len(node)) if node[one] not in (1, ABSENT) and not rests[one]]
    if name in ("hottest-first", "hot-set", "writes-first", "address"):
        assert len(seen) == min(free, len(movable))


def test_a_large_page_is_broken_where_little_of_it_is_hot() -> None:
    heat = np.zeros((4, 512))
    heat[0, :64] = 1.0
    heat[1, :] = 1.0
    heat[2, :65] = 1.0
    assert worth_breaking(heat).tolist() == [True, False, True, False]
    heat[2, :72] = 1.0
    assert not worth_breaking(heat)[2]
