"""What those who share, evict or replace pages need of the pager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Residency
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest

BATCH = 256
"""Pages: a megabyte in transit, and nobody waits longer for a page than such a batch takes."""


class Keeper(Protocol):
    """Moves pages of one guest under claims; what it does is told in :mod:`outboard.pager.pager`."""

    guest: Guest
    residency: Residency

    @property
    def clamp(self) -> Clamp: ...
    @property
    def regions(self) -> NDArray[np.int64]: ...
    @property
    def spaces(self) -> int: ...
    def claims(self, pages: PageSet, most: int = ...) -> Iterator[NDArray[np.int64]]: ...
    def give_up(self, claimed: NDArray[np.int64]) -> None: ...
    def runs_of(self, numbers: NDArray[np.int64]) -> Runs: ...
    def protect(self, runs: Runs, protected: bool) -> None: ...
    def punch(self, runs: Runs) -> bool: ...
    def read(self, runs: Runs, content: NDArray[np.uint8]) -> None: ...
    def read_and_look(self, runs: Runs, content: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]: ...
    def place(self, runs: Runs, content: NDArray[np.uint8], *, over: bool = ...) -> None: ...
    def follow_mappings(self) -> None: ...
