"""A plan: what a migration would do, as ranges, for each method; what stands in its way. Nothing is moved."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from outboard.migrate.method import Goal, Method, Options

_NOT_MUCH_LONGER = 1.25
_SHORTEST = "its time is the shortest, by the middle of the range"


class Range(msgspec.Struct, frozen=True):
    """From ``low`` to ``high``, both thought possible; a ``high`` of None is no end."""

    low: float
    high: float | None

    @property
    def middle(self) -> float:
        """Half-way; infinite where there is no end."""
        return math.inf if self.high is None else (self.low + self.high) / 2


class Blocker(msgspec.Struct, frozen=True):
    """Why it would be refused: ``reason`` is a stable word, ``at`` the host that refuses."""

    at: str
    reason: str
    words: str


class Watched(msgspec.Struct, frozen=True):
    """What was seen of the guest; pages, unless said otherwise.

    ``data``, ``zero`` and ``free_data`` were sampled and are ranges: pages with content, pages of zeros, and those of
    ``data`` that the guest holds free. ``early`` go before an enlightened switch-over. ``growth`` says how many
    different pages the guest wrote to within how many seconds.
    """

    pages: int
    populated: int
    data: Range
    zero: Range
    free_data: Range
    early: int
    compressed: float | None
    """What a page with content takes when zlib's fastest level has compressed it, as a share; None: there is none."""
    growth: list[tuple[float, int]]
    seconds: float
    trace: str
    hints: str
    hints_s: float
    on_disk: Range | None = None
    """Of ``data``, what disk images hold that nobody writes to; None: none of them has an index."""


class Link(msgspec.Struct, frozen=True):
    """What the bulk may be expected to reach, in bytes/s, and how that is known."""

    rate: Range
    known_from: str


class Past(msgspec.Struct, frozen=True):
    """What earlier migrations reached: the bulk's rates to that host (bytes/s), and of the VM its blackouts (ms), times
    to the resume of methods that resume early (s), and how far it did what the model of throttling said."""

    rates: list[float] = []
    blackouts_ms: list[float] = []
    resumes_s: list[float] = []
    throttle_gain: float = 1.0


class Expected(msgspec.Struct, frozen=True):
    """What one method would do. ``ends`` is None where that cannot be told."""

    method: Method
    ends: bool | None
    total_s: Range
    resume_s: Range
    blackout_ms: Range
    bytes: Range
    share: float
    """What the writing vCPUs would have of their processor time at the end."""
    verdict: str


class Plan(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.migration.plan.v1"):
    """The answer to ``outboard migrate VM HOST --plan``."""

    vm: str
    source: str
    destination: str
    options: Options
    blockers: list[Blocker]
    watched: Watched | None
    """None where the VM could not be looked at."""
    link: Link | None
    expected: list[Expected]
    recommended: Method | None
    why: str


def recommend(expected: list[Expected], goal: Goal | None) -> tuple[Method | None, str]:
    """The method that serves ``goal`` best by these figures, and why."""
    by_method = {one.method: one for one in expected}
    ending = [one for one in expected if one.ends]
    if not ending:
        return None, "no method can be said to end"

    def least(span: Callable[[Expected], Range]) -> Method:
        return min(ending, key=lambda one: span(one).middle).method

    match goal:
        case Goal.DOWNTIME:
            return least(lambda one: one.blackout_ms), "its blackout is the shortest, by the middle of the range"
        case Goal.TIME:
            return least(lambda one: one.total_s), _SHORTEST
        case Goal.BANDWIDTH:
            return least(lambda one: one.bytes), "it sends the fewest bytes, by the middle of the range"
    pre_copy, enlightened = by_method.get(Method.PRE_COPY), by_method.get(Method.ENLIGHTENED)
    if goal is Goal.GUEST_SPEED:
        if pre_copy is not None and pre_copy.ends and pre_copy.share >= 1:
            return Method.PRE_COPY, "it ends without holding anybody back, and no page is waited for afterwards"
        return Method.HYBRID, "a pre-copy would hold the guest back; here only what is written last is waited for"
    if (
        pre_copy is not None
        and enlightened is not None
        and pre_copy.ends
        and pre_copy.share >= 1
        and pre_copy.total_s.middle <= _NOT_MUCH_LONGER * enlightened.total_s.middle
    ):
        return Method.PRE_COPY, "it ends in like time, and until then losing the destination costs nothing"
    return least(lambda one: one.total_s), _SHORTEST
