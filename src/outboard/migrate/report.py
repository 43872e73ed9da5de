"""What a migration tells those who watch it: progress while it runs, a summary at its end.

Both are JSON objects with a ``schema``; the command line, the history and metrics read nothing else.
"""

from __future__ import annotations

import msgspec

from outboard.migrate.method import Goal, Method
from outboard.migrate.states import State, Where


class Round(msgspec.Struct, frozen=True):
    """One walk over memory before the switch-over."""

    sent_pages: int
    seconds: float
    dirty_pages: int
    """Pages written meanwhile."""
    share: float = 1.0
    """What its writers had of their processor time."""


class Slowed(msgspec.Struct, frozen=True):
    """From ``at`` on (seconds since the command) ``who`` had ``share`` of its processor time, and why."""

    at: float
    share: float
    who: str
    why: str


class Progress(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.migration.progress.v1"):
    """How far a migration is. Rates in bytes/s, times in seconds since the command."""

    migration: str
    vm: str
    state: State
    safe_at: Where
    elapsed: float
    fraction: float
    """0 to 1, never less than before."""
    remaining_bytes: int
    sent_bytes: int
    rate: float
    dirty_rate: float | None
    """None where no trace is armed."""
    eta: tuple[float, float] | None
    """Seconds left, at best and at worst; None when it cannot be told."""
    verdict: str


class Summary(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.migration.summary.v1"):
    """How a migration ended. None where it did not get that far."""

    migration: str
    vm: str
    source: str
    destination: str
    method: Method
    started: float
    """Seconds since 1970."""
    state: State
    safe_at: Where
    error: str | None
    total_s: float
    time_to_resume_s: float | None
    blackout_ms: float | None
    """From the STOP event at the source to the news of the RESUME, by the source's clock."""
    bytes: int
    """On the streams, before encryption: pages, requests, device state."""
    pages: int
    data_pages: int
    zero_pages: int
    urgent_pages: int
    never_sent_pages: int
    """Free in the guest, or without memory."""
    resent_pages: int
    hints: str
    """Where the hints came from, or why there were none."""
    trace: str | None
    attach_ms: float
    arm_ms: float | None
    rounds: list[Round]
    remote_faults: int | None
    zero_faults: int | None
    minor_faults: int | None
    fault_p50_us: float | None
    fault_p99_us: float | None
    mapped_before_resume: int | None
    bulk_rate: float | None
    """Bytes/s of the bulk after the resume."""
    verified: bool | None
    """Whether the digests of both ends agreed; None unless asked for."""
    exit_code: int
    large_mappings_before: int | None = None
    """Of 2 MiB, at the source before anything was done to it."""
    large_mappings_after: int | None = None
    """At the destination when it had rebuilt what it could; None: the source did not hear of it."""
    throttle: list[Slowed] = []
    throttle_gain: float = 1.0
    """How much more the guest wrote when held back than the model said; the next migration of the VM begins with it."""
    streams: int = 1
    """For the bulk."""
    content_bytes: int = 0
    """What the pages that the bulk sent held, those of zeros nothing."""
    packed_bytes: int = 0
    """What that was on the wire."""
    reference_pages: int = 0
    """That went as a reference to one with the same content."""
    changed_pages: int = 0
    """That were sent again as what had changed of them."""
    pages_by_block: int = 0
    """That went as references to blocks of disk images."""
    refused_blocks: int = 0
    """Of these, that the destination did not find there, and that were sent."""
    blocks: str = ""
    """Which images both hosts have, or why none is used."""
    codecs: dict[str, int] = {}
    """Pages that went whole, by codec."""
    codec_s: float = 0.0
    """Processor time of the source that went into packing, and into finding out whether it pays."""
    goal: Goal | None = None
    queues: str = ""
    """Whose queues are known, or why none are."""
    queue_pages: int | None = None
    """Of the devices' queues and of requests in flight, at the pause."""
    loading_faults: int | None = None
    """In the pause QEMU waited for a page from the source, to load its devices."""
    device_faults: int | None = None
    """After the resume QEMU's own threads, not a vCPU, waited for a page from the source."""
    queue_faults: int | None = None
    """Of the first 32 of both, those on ``queue_pages``, which were to be there."""
    cut_short: str | None = None
    """Why the rounds ended before what was left fitted in the pause; None: they did not."""


def is_progress(report: bytes) -> bool:
    """Whether an encoded report is a :class:`Progress`, after which there are more."""
    return report.startswith(b'{"schema":"outboard.migration.progress.v1"')


def verdict(dirty_rate: float | None, rate: float, *, resumes_early: bool) -> str:
    """Say in words whether rounds of copying can catch up with the guest.

    :param dirty_rate: what the guest writes, and :param rate: what goes out, both in bytes/s.
    """
    if resumes_early:
        return "converges whatever the guest writes: a page is sent once after the switch-over"
    if dirty_rate is None or not rate:
        return "measuring"
    share = dirty_rate / rate
    words = f"the guest writes {dirty_rate / 1e6:.0f} MB/s and {rate / 1e6:.0f} MB/s go out ({share:.0%})"
    if share < 0.5:
        return f"converges: {words}"
    if share < 0.95:
        return f"converges slowly: {words}"
    return f"does not converge: {words}; cancel, or use --enlightened or --hybrid"
