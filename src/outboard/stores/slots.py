"""Which slots of a page each are taken.

The array is mapped from a file, so that it outlives the process that writes it. It is a convenience, not the truth:
after a crash the truth is which slots a residency refers to, and :meth:`Slots.retain` makes the one follow from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.pages.shared import file_array

_WINDOW = 1 << 14


class Slots:
    """``count`` slots, described by the file at ``path``, which is made if it is not there.

    ``taken`` is the live array (uint8), which a compiled loop may set to 0.

    :raise OutboardError: the file is there and describes another number of slots.
    :raise KernelError: it cannot be made or mapped.

    Synchronization: one thread allocates; any frees. A byte is stored whole.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.count = count
        self.taken: NDArray[np.uint8] = file_array(path, count, np.uint8)
        self._hand = 0

    def allocate(self, wanted: int) -> NDArray[np.uint64] | None:
        """Take ``wanted`` slots, in a row where there is room for that; None when so many are not free."""
        found: list[NDArray[np.int64]] = []
        missing = wanted
        for begin, end in self._windows():
            free = np.flatnonzero(self.taken[begin:end] == 0)[:missing] + begin
            self.taken[free] = 1
            found.append(free)
            missing -= free.size
            if not missing:
                break
        slots = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        if missing:
            self.taken[slots] = 0
            return None
        if slots.size:
            self._hand = int(slots[-1] + 1) % self.count
        return slots.astype(np.uint64)

    def _windows(self) -> list[tuple[int, int]]:
        """All slots from the hand on and around, in pieces."""
        whole = [(at, min(at + _WINDOW, self.count)) for at in range(self._hand, self.count, _WINDOW)]
        return whole + [(at, min(at + _WINDOW, self._hand)) for at in range(0, self._hand, _WINDOW)]

    def free(self, slots: NDArray[np.uint64]) -> None:
        """Give slots back; what they hold is lost."""
        self.taken[slots] = 0

    def retain(self, slots: NDArray[np.uint64]) -> None:
        """After a crash: exactly these are taken."""
        kept = np.zeros(self.count, dtype=np.uint8)
        kept[slots] = 1
        self.taken[:] = kept

    def used(self) -> int:
        """How many slots are taken."""
        return int(np.count_nonzero(self.taken))
