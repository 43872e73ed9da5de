"""TrapRing: which pages are traced, and the accesses to them that were caught.

Data only, in memory that the processes of one engine share: whoever serves the guest's faults or looks at its page
tables calls :func:`note`, whoever wants to know calls :meth:`TrapRing.take`. A record says when an access happened as
well as it is known: after one moment and no later than another, which are the same where a fault told of it; and how
much processor time the guest had used by the latter, since a guest that does not run touches nothing.

A page is traced from the moment its flag is set until its first access is noted. The ring is bounded; what found no
room is counted, and its page is untraced all the same.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from outboard.pages.shared import publish, shared_array

ACCESS = np.dtype([("page", "<i8"), ("after", "<i8"), ("at", "<i8"), ("ran", "<i8"), ("write", "<i8")])
"""A page's first access: it came after ``after`` and at ``at`` at the latest, CLOCK_MONOTONIC in nanoseconds; ``ran``:
the guest's processor time at ``at``, in nanoseconds; ``write``: not 0 for a write, -1 where that cannot be told."""

_NOTED, _TAKEN, _DROPPED = range(3)


@njit("boolean(uint8[::1], int64[::1], int64[:, ::1], int64, int64, int64, int64, int64)", cache=True, nogil=True)
def note(
    traced: NDArray[np.uint8],
    state: NDArray[np.int64],
    records: NDArray[np.int64],
    page: int,
    after: int,
    at: int,
    ran: int,
    write: int,
) -> bool:
    """Note an access, from compiled code; whether the page was traced, without which nothing is noted.

    :param traced: with ``state`` and ``records``, the ring's arrays.
    """
    if traced[page] == 0:
        return False
    noted = state[_NOTED]
    if noted - state[_TAKEN] < records.shape[0]:
        row = noted % records.shape[0]
        records[row, 0] = page
        records[row, 1] = after
        records[row, 2] = at
        records[row, 3] = ran
        records[row, 4] = write
        publish(state, _NOTED, noted + 1)  # type: ignore[call-arg]  # numba passes one
    else:
        state[_DROPPED] += 1
    traced[page] = 0
    return True


class TrapRing:
    """The traced pages of a guest, and room for ``room`` accesses that nobody has taken yet.

    Synchronization: one thread or process notes, one takes; made before it is forked. Flags are bytes: the one who
    takes sets them, the one who notes clears them.
    """

    def __init__(self, pages: int, room: int = 8192) -> None:
        self.traced: NDArray[np.uint8] = shared_array(pages, np.uint8)
        self.state: NDArray[np.int64] = shared_array(3, np.int64)
        self.records: NDArray[np.int64] = shared_array(room * 5, np.int64).reshape(room, 5)

    def take(self) -> NDArray[np.void]:
        """The accesses noted since the last call, as :data:`ACCESS`, in the order in which they were noted."""
        noted, taken = int(self.state[_NOTED]), int(self.state[_TAKEN])
        rows = np.arange(taken, noted) % len(self.records)
        found = np.ascontiguousarray(self.records[rows]).view(ACCESS).reshape(-1)
        self.state[_TAKEN] = noted
        return found

    @property
    def dropped(self) -> int:
        """Accesses that found no room."""
        return int(self.state[_DROPPED])
