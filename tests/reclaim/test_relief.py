"""A host under pressure, in a recorded minute."""

from __future__ import annotations

from outboard.reclaim.relief import CALM_S, PART, Relief
from outboard.reclaim.victims import Holder

MIB = 1 << 20


def holders(a: int, b: int) -> list[Holder]:
    return [Holder("a", a * MIB, 100 * MIB, 0.5, 1.0), Holder("b", b * MIB, 0, 0.5, 1.0)]


def test_targets_fall_while_there_is_pressure_and_are_lifted_later() -> None:
    relief = Relief(PART * 64 * MIB)
    assert relief.calm(0.0) == []
    first = relief.press(holders(1000, 500), 1.0)
    assert first == {"a": 936 * MIB}
    second = relief.press(holders(990, 500), 3.0)
    assert second == {"a": 872 * MIB}
    assert relief.calm(3.0 + CALM_S / 2) == []
    assert relief.calm(3.0 + CALM_S) == ["a"]
    assert relief.calm(99.0 + CALM_S) == []


def test_nobody_is_asked_for_what_is_kept_for_him() -> None:
    relief = Relief(PART * 1024 * MIB)
    assert relief.press(holders(120, 30), 1.0) == {"a": 100 * MIB, "b": 0}
