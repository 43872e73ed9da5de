"""What a migration learns on its way, for the summary."""

from __future__ import annotations

from dataclasses import dataclass

from outboard.migrate.messages import Arrived


@dataclass(slots=True)
class Findings:
    """Each is noted by whoever comes upon it; None where the migration did not get that far."""

    hints: str = "not asked for"
    queues: str = "not asked for"
    queue_pages: int | None = None
    trace: str | None = None
    large_mappings: int | None = None
    """At the source, before anything was done to it."""
    large_mappings_after: int | None = None
    """At the destination, once it has rebuilt what it could."""
    total_s: float | None = None
    """When the source was free."""
    arm_ms: float | None = None
    stopped_at: float | None = None
    """When the guest stopped, in seconds of the wall clock."""
    resume_s: float | None = None
    blackout_ms: float | None = None
    resent_pages: int = 0
    bulk_rate: float | None = None
    verified: bool | None = None
    arrived: Arrived | None = None
