"""Figures as people read them: shared by the table on the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable

from .document import Arm
from .figures import Spread

NONE = "-"
"""Shown where an arm has no such figure."""


def seconds(value: float) -> str:
    """Two digits after the point below 10 s, one above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def whole(value: float) -> str:
    """Without digits after the point, thousands apart."""
    return f"{value:,.0f}"


def megabytes(value: float) -> str:
    """Bytes as millions."""
    return f"{value / 1e6:,.0f}"


def percent(value: float) -> str:
    """A share of one."""
    return f"{100 * value:.0f} %"


COLUMNS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("time_to_resume_s", "resumed after", "s", seconds),
    ("blackout_ms", "blackout", "ms", whole),
    ("longest_gap_ms", "longest gap", "ms", whole),
    ("total_s", "source free after", "s", seconds),
    ("bytes", "sent", "MB", megabytes),
    ("remote_faults", "remote faults", "", whole),
    ("fault_p50_us", "fault p50", "µs", whole),
    ("fault_p99_us", "fault p99", "µs", whole),
    ("ops_before", "ops/s before", "", whole),
    ("ops_during", "ops/s during", "", whole),
    ("ops_after", "ops/s after", "", whole),
    ("ops_lost", "ops lost", "", whole),
)
"""Figure, heading, unit, how it is written; in the order of the columns."""


def median(arm: Arm, figure: str, write: Callable[[float], str]) -> str:
    """The figure's median, or why there is none."""
    spread = arm.spread.get(figure)
    if spread is None:
        return "did not converge" if figure == "total_s" and not arm.converged else NONE
    return write(spread.median)


def extremes(arm: Arm, figure: str, write: Callable[[float], str]) -> str:
    """Least and most over the runs, empty where they read the same."""
    spread: Spread | None = arm.spread.get(figure)
    if spread is None or write(spread.min) == write(spread.max):
        return ""
    return f"{write(spread.min)} to {write(spread.max)}"
