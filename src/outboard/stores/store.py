"""What every place where absent pages live can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """``used`` and ``room`` in pages; ``put`` and ``fetched`` since the store was opened."""

    used: int
    room: int
    put: int
    fetched: int


class Store(Protocol):
    """Keeps pages under locators of its own choosing.

    A locator is a number that means something to the store alone. What :meth:`put` has returned is kept through the end
    of the process that put it, until it is dropped.
    """

    def put(self, content: NDArray[np.uint8], digests: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
        """Keep whole pages; the locator of each, in order.

        :param digests: of each page, by :func:`~outboard.pages.content.page_digests`, where they are known already.
        :raise StoreFullError: there is no room for all of them; none is kept.
        """

    def fetch(self, locators: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        """Read pages back into ``into``, one after the other; they stay.

        :raise DamagedPageError: one is not what was put there; nothing of ``into`` may be used.
        """

    def drop(self, locators: NDArray[np.uint64]) -> None:
        """Forget pages."""

    def retain(self, locators: NDArray[np.uint64]) -> None:
        """After a crash: keep exactly these, and forget everything else."""

    def statistics(self) -> StoreStatistics:
        """A frozen snapshot."""

    def close(self) -> None:
        """Let go of it; what it keeps stays."""
