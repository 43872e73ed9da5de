"""Who gives memory when the host needs it."""

from __future__ import annotations

import pytest

from outboard.reclaim.victims import CHUNK, Holder, victims

MIB = 1 << 20


def holder(vm: str, resident: int = 1024, kept: int = 0, active: float = 0.5, shares: float = 1.0) -> Holder:
    return Holder(vm, resident * MIB, kept * MIB, active, shares)


def test_those_alike_give_alike() -> None:
    taken = victims([holder("a"), holder("b")], 512 * MIB)
    assert taken == {"a": 256 * MIB, "b": 256 * MIB}


def test_shares_are_kept_in_proportion() -> None:
    taken = victims([holder("a", shares=2, active=1), holder("b", shares=1, active=1)], 512 * MIB)
    left = {vm: 1024 * MIB - taken.get(vm, 0) for vm in "ab"}
    assert left["a"] / left["b"] == pytest.approx(2, rel=0.05)


def test_idle_memory_is_taxed() -> None:
    assert victims([holder("idle", active=0.1), holder("busy", active=1.0)], 512 * MIB) == {"idle": 512 * MIB}
    # Four times the shares weigh an idle page as heavy as a used one.
    taken = victims([holder("idle", active=0.0, shares=4.1), holder("busy", active=1.0)], 2 * CHUNK)
    assert taken == {"busy": 2 * CHUNK}


def test_nobody_gives_what_is_reserved_for_him_nor_while_he_misses_it() -> None:
    one = Holder("a", 100 * MIB, 90 * MIB, 0.0, 1.0)
    other = Holder("b", 1000 * MIB, 0, 0.0, 1.0, backs_off=True)
    assert victims([one, other], 512 * MIB) == {"a": 10 * MIB}
    assert victims([], 512 * MIB) == {}
    assert victims([one], 0) == {}
