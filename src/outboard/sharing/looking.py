"""A VM that is only looked at: its pages are read where they are, and nothing of it changes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.errors import RefusedError
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Where
from outboard.sharing.domain import Spans
from outboard.vmm.large_pages import large_mappings
from outboard.vmm.registry import VmRecord


class Looked:
    """A VM as a member of a domain that shares nothing.

    :raise NotFoundError, RefusedError, UnreachableError: as :func:`outboard.vmm.attach.attach`.
    """

    def __init__(self, record: VmRecord) -> None:
        self.name = record.name
        self._guest = record.attach(managed=True)
        self.pages = self._guest.pages
        self.where: NDArray[np.uint8] = np.full(self.pages, Where.RESIDENT, dtype=np.uint8)
        self.locator: NDArray[np.uint64] = np.zeros(self.pages, dtype=np.uint64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guest.close()

    def regions(self) -> NDArray[np.int64]:
        """As the member's."""
        return self._guest.memory.table()

    def populated(self) -> PageSet:
        """As the member's."""
        return self._guest.memory.populated()

    def _refuse(self) -> int:
        raise RefusedError("sharing", f"{self.name} is only looked at")

    def share(self, spans: Spans) -> int:  # noqa: ARG002  # the member's signature
        """Not here."""
        return self._refuse()

    def drop_zeros(self, runs: Runs) -> int:  # noqa: ARG002  # the member's signature
        """Not here."""
        return self._refuse()

    def large(self) -> PageSet:
        """As the member's."""
        return large_mappings(self._guest)

    def rebuild(self, blocks: list[int]) -> int:  # noqa: ARG002  # the member's signature
        """Not here."""
        return self._refuse()

    def tidy(self) -> int:
        """Not here."""
        return self._refuse()
