"""Heat: how often each page is touched lately, and since when it has not been.

The frequency of a page is an average that forgets: what lies ``half_life`` back counts half. Scores are kept as if all
were of one moment, the origin, so that touching a page is one addition and decay costs nothing; the origin moves on
before the scores grow out of their range. 8 bytes a page, or for each ``per`` pages where large ones are watched.

Clocks are passed in: seconds, from any origin.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from outboard.pages.pageset import PageSet

_FURTHEST = 60.0
"""Half-lives that the origin may lie back: 2**60 of a touch now is far within a float."""


class Heat:
    """The heat of a guest's pages.

    :param half_life: in seconds; :param now: the present moment; :param per: pages that are touched as one.

    Synchronization: none.
    """

    def __init__(self, pages: int, half_life: float, now: float, per: int = 1) -> None:
        self.pages, self.half_life, self.per = pages, half_life, per
        cells = -(-pages // per)
        self._scores: NDArray[np.float32] = np.zeros(cells, dtype=np.float32)
        self._last: NDArray[np.float32] = np.full(cells, -np.inf, dtype=np.float32)
        self._began = self._origin = now

    def _weight(self, now: float) -> float:
        return float(2.0 ** ((now - self._origin) / self.half_life))

    def touch(self, pages: NDArray[np.integer], now: float) -> None:
        """Count an access to each of ``pages``; repeats count again.

        :raise IndexError: a number outside the guest.
        """
        if now - self._origin > _FURTHEST * self.half_life:
            self._scores /= self._weight(now)
            self._origin = now
        cells = pages // self.per
        np.add.at(self._scores, cells, self._weight(now))
        self._last[cells] = now - self._began

    def frequencies(self, now: float) -> NDArray[np.float64]:
        """Accesses per second, one number for each ``per`` pages."""
        # What a steady rate of 1/s adds up to is the half-life over ln 2.
        return self._scores.astype(np.float64) * (math.log(2) / self.half_life / self._weight(now))

    def hottest_first(self) -> NDArray[np.int64]:
        """The first page of each cell that was ever touched, hottest first; those alike by their number."""
        touched = np.flatnonzero(self._scores)
        return touched[np.argsort(-self._scores[touched], kind="stable")] * self.per

    def cold(self, age: float, now: float) -> PageSet:
        """The pages that have not been touched for ``age`` seconds; none before they have been watched for so long."""
        if now - self._began < age:
            return PageSet(self.pages)
        cold = np.repeat(self._last <= now - self._began - age, self.per)[: self.pages]
        return PageSet.from_mask(cold)
