"""The desk: where a migration gets its destination and its orders, and hands in its reports.

The engine implements it over its pipe to the agent; a test plays it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

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


class Limit(msgspec.Struct, frozen=True, tag="limit", forbid_unknown_fields=True):
    """Change limits: the bandwidth in bytes/s, None is unlimited; the longest pause in seconds. What is UNSET stays."""

    max_bandwidth: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType | None = msgspec.UNSET
    max_downtime: Annotated[float, msgspec.Meta(ge=0)] | msgspec.UnsetType = msgspec.UNSET


class Switch(msgspec.Struct, frozen=True, tag="switch"):
    """Copy no longer, and switch over now."""


Order = Cancel | Limit | Switch


class Desk(Protocol):
    """What a migration needs of whoever commissioned it."""

    def fileno(self) -> int:
        """Readable when an order waits."""

    def order(self) -> Order | None:
        """The next order; None when the commissioner is gone, which is no order to stop."""

    def report(self, report: Progress | Summary) -> None:
        """Take a report; must not block."""
