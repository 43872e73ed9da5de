"""How fast one VM's memory is reclaimed: towards a target, as long as the VM does not miss it.

A VM that gets less than it uses says so by faults on what was taken: the refaults. Pages are taken in steps, each twice
as large as the last while few come back. When more come back than allowed, nothing is taken for a while, a little of
the way to the target is given up, and the next step is small again; each such time in a row the pause is twice as long.
So the VM settles above the target where its working set ends, and is tried again now and then, for that may shrink.

Clocks and readings are passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
LEAST, MOST = 4 * MIB, 256 * MIB
"""Bytes of a step."""
PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
MOST_REFAULTS = 200.0
"""Refaults per second that a VM bears without being heard."""
GIVE_BACK = 16
"""This part of the memory that was taken is given up by a VM that misses it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A VM at ``now`` (seconds): bytes of memory, and of it resident; faults on what was taken, since the beginning."""

    now: float
    memory: int
    resident: int
    refaults: int


class Controller:
    """Steers towards ``target`` bytes resident.

    :param most_refaults: per second.

    ``goal`` is what is aimed at just now: the target, or more while the VM misses its memory.

    Synchronization: one thread.
    """

    def __init__(self, target: int, most_refaults: float = MOST_REFAULTS) -> None:
        self.target, self.most_refaults = target, most_refaults
        self.goal = target
        self.refault_rate = 0.0
        self._step = LEAST
        self._pause = PAUSE_S
        self._quiet_from = 0.0
        self._last: Reading | None = None
        self._took = False

    @property
    def backs_off(self) -> bool:
        """Whether the VM has missed what was taken, and is left alone."""
        return self.goal > self.target

    def step(self, reading: Reading) -> int:
        """How many bytes to take now."""
        last, self._last = self._last, reading
        if last is None or reading.now <= last.now:
            return 0
        self.refault_rate = (reading.refaults - last.refaults) / (reading.now - last.now)
        if self.refault_rate > self.most_refaults:
            self._back_off(reading)
            return 0
        if reading.now < self._quiet_from:
            return 0
        if self.backs_off:
            # It has been calm: another try, from where it stands.
            self.goal = max(self.target, min(self.goal, reading.resident) - self._step)
        wanted = reading.resident - self.goal
        if wanted <= 0:
            if not self.backs_off:
                self._pause = PAUSE_S
            return 0
        taken = min(wanted, self._step)
        self._step = min(MOST, self._step * 2)
        return taken

    def _back_off(self, reading: Reading) -> None:
        self._step = LEAST
        if reading.now >= self._quiet_from:
            taken = max(0, reading.memory - reading.resident)
            self.goal = min(reading.memory, max(reading.resident, self.goal) + taken // GIVE_BACK)
            self._quiet_from = reading.now + self._pause
            self._pause = min(LONGEST_PAUSE_S, self._pause * 2)
