"""The desk: where a migration gets its destination and its orders, and hands in its reports.

The engine implements it over its pipe to the agent; a test plays it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from outboard.migrate.report import Progress, Summary


@dataclass(frozen=True, slots=True)
class Destination:
    """The agent that shall take the VM: the host's name in its certificate, and where the agent listens."""

    name: str
    address: str
    port: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop the migration, if it has not committed."""


class Limit(msgspec.Struct, frozen=True, tag="limit"):
    """Change the bandwidth limit; bytes/s, None is unlimited."""

    max_bandwidth: int | None


Order = Cancel | Limit


class Desk(Protocol):
    """What a migration needs of whoever commissioned it."""

    def fileno(self) -> int:
        """Readable when an order waits."""

    def order(self) -> Order | None:
        """The next order; None when the commissioner is gone, which is no order to stop."""

    def report(self, report: Progress | Summary) -> None:
        """Take a report; must not block."""
