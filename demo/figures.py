"""What a run says in numbers, and how the numbers are had from what was recorded.

Every arm is judged alike. All moments are seconds after the command, on one clock (CLOCK_MONOTONIC), because both
hosts are the same machine.

before
    the :data:`BEFORE_S` seconds up to the command.
during
    from the command to the end, which is when the source's VM process is no longer needed. An arm that has not
    ended when its time is up "did not converge" and is cancelled; then "during" ends there.
after
    :data:`AFTER_S` seconds, from :data:`SETTLE_S` after the end on. Each VM has a core of its own by then, and the
    rate of both together is the *reference*.
aggregate operations lost
    over the first *window* seconds after the command, the same for every arm of a session: reference times window,
    less the answers that both VMs gave. The run is watched until the end of "after"; for the rest of the window
    nothing is lost, the eviction being over. An arm that did not converge has no reference of its own and is given
    the median of the others.
longest gap
    the longest stall between two 20 ms ticks of the guest's own clock, plus the blackout, during which that clock
    stands still.
bytes
    sent by host A's end of the link between command and end, as the interface counts them.
link share
    the highest mean use of the link over one second, as a share of its rate: what the bulk reached.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from .load import Traffic

BEFORE_S = 4.0
SETTLE_S = 1.0
AFTER_S = 5.0


class Outcome(msgspec.Struct, kw_only=True):
    """What the product under test did, in its own words and by its VMM's events.

    :ivar command_at: CLOCK_MONOTONIC when the product's server (QEMU's monitor, Outboard's agent) was asked.
    :ivar lead_s: from the start of the product's command to that moment.
    :ivar total_s: None when it did not converge.
    :ivar watched_s: how long the client was at work after the command.
    :ivar note: for the reader of the report; empty when all is as it should be.
    :ivar summary: the product's own account, as it gave it.
    """

    command_at: float
    converged: bool
    lead_s: float = 0.0
    watched_s: float = 0.0
    time_to_stop_s: float | None = None
    time_to_resume_s: float | None = None
    total_s: float | None = None
    given_up_s: float | None = None
    remote_faults: int | None = None
    fault_p50_us: float | None = None
    fault_p99_us: float | None = None
    note: str = ""
    summary: dict[str, Any] | None = None

    @property
    def during_s(self) -> float:
        """From the command to the end, or to the moment when it was given up."""
        return next(second for second in (self.total_s, self.given_up_s, self.watched_s) if second is not None)

    @property
    def blackout_ms(self) -> float | None:
        """STOP at the source to RESUME at the destination."""
        if self.time_to_stop_s is None or self.time_to_resume_s is None:
            return None
        return 1e3 * (self.time_to_resume_s - self.time_to_stop_s)


class LinkUse(msgspec.Struct, kw_only=True):
    """The bytes host A had sent on the link at moments of CLOCK_MONOTONIC."""

    at_s: list[float]
    bytes: list[int]

    def between(self, begin_s: float, end_s: float) -> int:
        """Bytes sent between two moments, interpolated between samples."""
        return round(float(np.diff(np.interp([begin_s, end_s], self.at_s, self.bytes))[0]))

    def busiest(self, begin_s: float, end_s: float, span_s: float = 1.0) -> float:
        """The highest mean rate over *span_s* seconds within the interval, in bytes/s; the whole if it is shorter."""
        span_s = min(span_s, end_s - begin_s)
        starts = np.append(np.arange(begin_s, end_s - span_s, 0.05), end_s - span_s)
        sent = np.interp(starts + span_s, self.at_s, self.bytes) - np.interp(starts, self.at_s, self.bytes)
        return float(sent.max() / span_s)


class Run(msgspec.Struct, kw_only=True):
    """One run of one arm: what was recorded and the figures had from it.

    :ivar verified: the guest's check of its whole working set passed after the migration, the client saw no wrong
        value and no broken connection and, where the product compares page digests at the switch-over, these agreed.
    :ivar ops_before: answers a second per VM; so are the other two.
    """

    arm: str
    churned: bool
    shape: str
    accelerator: str
    outcome: Outcome
    traffic: Traffic
    link: LinkUse
    blackout_ms: float | None
    longest_gap_ms: float | None
    bytes: int
    link_share: float | None
    writes_per_s_before: float | None
    writes_per_s_during: float | None
    ops_before: dict[str, float]
    ops_during: dict[str, float]
    ops_after: dict[str, float] | None
    ops_lost: float | None
    client_wait_ms: float
    verified: bool
    checks: list[str]

    @property
    def name(self) -> str:
        """The arm's name, and the guest's state where it is not the usual one."""
        return self.arm if self.churned else f"{self.arm} (unchurned)"

    @property
    def reference(self) -> float | None:
        """Answers a second of both VMs when each has a core of its own."""
        return None if self.ops_after is None else sum(self.ops_after.values())


def ops_lost(traffic: Traffic, command_at: float, watched_s: float, window_s: float, reference: float) -> float:
    """Answers that were not given within the window because of the contention and of the migration.

    :param watched_s: how long after the command the client was still at work.
    :param reference: answers a second of all VMs together, each with a core of its own.
    """
    seconds = min(window_s, watched_s)
    return reference * seconds - traffic.count(traffic.total(), command_at, command_at + seconds)


def rates(traffic: Traffic, begin_s: float, end_s: float) -> dict[str, float]:
    """Answers a second of each VM between two moments."""
    return {vm: traffic.rate(vm, begin_s, end_s) for vm in traffic.ops}


def settle_losses(runs: Sequence[Run], window_s: float) -> None:
    """Fill in ``ops_lost`` of every run, now that all references are known."""
    known = [run.reference for run in runs if run.reference is not None]
    usual = statistics.median(known) if known else None
    for run in runs:
        reference = run.reference if run.reference is not None else usual
        if reference is not None:
            outcome = run.outcome
            run.ops_lost = ops_lost(run.traffic, outcome.command_at, outcome.watched_s, window_s, reference)


class Spread(msgspec.Struct, frozen=True):
    """A figure over the runs of an arm."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None when no run has the figure."""
        known = [value for value in values if value is not None]
        return cls(min(known), statistics.median(known), max(known)) if known else None
