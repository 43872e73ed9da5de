"""What a host under memory pressure asks of its VMs: a target for each, lower while tasks wait, lifted when none does.

Each time that tasks have waited too long in a window, a fiftieth of the host's memory is to be given, by those whom
shares and idle memory name: their targets go down by it. After a minute without, all targets are
lifted again: what is away stays away until it is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

from outboard.reclaim.victims import Holder, victims

PART = 50
CALM_S = 60.0


class Relief:
    """Targets of a host with ``memory`` bytes.

    Synchronization: one thread; clocks are passed in.
    """

    def __init__(self, memory: int) -> None:
        self._need = memory // PART
        self._targets: dict[str, int] = {}
        self._pressed = 0.0

    def press(self, holders: Sequence[Holder], now: float) -> dict[str, int]:
        """Tasks have waited for memory: the targets (bytes) that are new."""
        self._pressed = now
        new = {}
        by_name = {one.vm: one for one in holders}
        for vm, size in victims(holders, self._need).items():
            one = by_name[vm]
            new[vm] = max(one.kept, min(self._targets.get(vm, one.resident), one.resident) - size)
        self._targets |= new
        return new

    def calm(self, now: float) -> list[str]:
        """No task has waited lately: the VMs whose targets are to be lifted, if it has been so for long enough."""
        if not self._targets or now - self._pressed < CALM_S:
            return []
        lifted, self._targets = sorted(self._targets), {}
        return lifted
