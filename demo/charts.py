"""The charts of the report, as inline SVG.

One chart an arm, all with the same two axes, so that the eye compares what the numbers say: the answers a second of
each VM, below them the use of the migration's link, and upright lines where the command was given, the VM resumed and
the source was done. Colours come from the page's style sheet, so that a chart follows its light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from .figures import BEFORE_S, Run

WIDTH = 1060
_LEFT, _RIGHT = 62, 8
_TOP, _PLOT, _SPACE, _STRIP, _BOTTOM = 30, 150, 10, 26, 24
_BASE = _TOP + _PLOT + _SPACE + _STRIP
HEIGHT = _BASE + _BOTTOM
_SMOOTH = 5
"""Buckets that the bold line is the mean of."""


@dataclass(frozen=True)
class Scale:
    """The axes that all charts of a page share.

    :ivar seconds: how far to the right of the command they reach.
    :ivar ops: the upper edge, answers a second of one VM.
    :ivar link: bytes a second at the upper edge of the strip.
    """

    seconds: float
    ops: float
    link: float
    link_name: str

    def x(self, second: float) -> float:
        """Where a moment after the command lies."""
        return _LEFT + (second + BEFORE_S) / (self.seconds + BEFORE_S) * (WIDTH - _LEFT - _RIGHT)

    def y(self, ops: float) -> float:
        """Where a rate lies."""
        return _TOP + _PLOT * (1 - min(ops / self.ops, 1.0))


def nice_above(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten at or above *value*."""
    power = 10.0 ** np.floor(np.log10(max(value, 1.0)))
    return next(float(step * power) for step in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if step * power >= value)


def scale_of(runs: Sequence[Run], seconds: float, link_bytes_per_s: float | None) -> Scale:
    """Axes that hold every run; an unshaped link's strip reaches to the busiest moment of all."""
    highest = 0.0
    for run in runs:
        for counts in run.traffic.ops.values():
            highest = max(highest, float(np.percentile(np.array(counts) / run.traffic.bucket_s, 99.5)))
    if link_bytes_per_s is not None:
        return Scale(seconds, nice_above(highest), link_bytes_per_s, "link")
    busiest = max(float(_link_rates(run)[1].max(initial=1.0)) for run in runs)
    return Scale(seconds, nice_above(highest), nice_above(busiest), f"link, of {nice_above(busiest) * 8e-9:.1f} Gbit/s")


def _link_rates(run: Run, step_s: float = 0.1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = np.arange(run.link.at_s[0], run.link.at_s[-1], step_s)
    sent = np.interp(at, run.link.at_s, run.link.bytes)
    return at[:-1] - run.outcome.command_at, np.diff(sent) / step_s


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _line(run: Run, vm: str, scale: Scale, style: str) -> str:
    """The recorded buckets as a faint line, their mean over half a second on top of it."""
    traffic = run.traffic
    rates = np.array(traffic.ops[vm]) / traffic.bucket_s
    seconds = traffic.origin_s - run.outcome.command_at + traffic.bucket_s * (np.arange(len(rates)) + 0.5)
    means = np.convolve(rates, np.ones(_SMOOTH) / _SMOOTH, mode="same")
    means[: _SMOOTH // 2], means[len(means) - _SMOOTH // 2 :] = np.nan, np.nan
    watched = run.outcome.watched_s  # what comes after it is the checking
    lines = []
    for values, kind in ((rates, f"{style} raw"), (means, style)):
        seen = (seconds >= -BEFORE_S) & (seconds <= min(scale.seconds, watched)) & ~np.isnan(values)
        points = _points([scale.x(s) for s in seconds[seen]], [scale.y(rate) for rate in values[seen]])
        lines.append(f'<polyline class="{kind}" points="{points}"/>')
    return "".join(lines)


def _strip(run: Run, scale: Scale) -> str:
    seconds, rates = _link_rates(run)
    seen = (seconds >= -BEFORE_S) & (seconds <= scale.seconds)
    base = _BASE
    if not seen.any():
        return ""
    xs = [scale.x(s) for s in seconds[seen]]
    ys = [base - _STRIP * min(rate / scale.link, 1.0) for rate in rates[seen]]
    points = _points([xs[0], *xs, xs[-1]], [base, *ys, base])
    return f'<polygon class="link" points="{points}"/>'


def _axes(scale: Scale) -> list[str]:
    bottom, base = _TOP + _PLOT, _BASE
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = scale.y(scale.ops * share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{scale.ops * share:,.0f}</text>'
        )
    parts.append(
        f'<text class="tick" x="{_LEFT - 8}" y="{base - 8}" text-anchor="end">{escape(scale.link_name)}</text>'
    )
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    step = 2 if scale.seconds <= 24 else 5
    for second in range(-int(BEFORE_S), int(scale.seconds) + 1):
        if second % step == 0:
            x = scale.x(second)
            label = "command" if second == 0 else f"{second:+d} s"
            anchor = "end" if x > WIDTH - _RIGHT - 14 else "middle"
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{label}</text>')
    return parts


def _upright(x: float, style: str) -> str:
    return f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{_BASE}"/>'


def _marks(run: Run, scale: Scale) -> list[str]:
    outcome = run.outcome
    begin, edge = scale.x(0), scale.x(min(outcome.during_s, scale.seconds))
    parts = [f'<rect class="busy" x="{begin:.1f}" y="{_TOP}" width="{edge - begin:.1f}" height="{_BASE - _TOP}"/>']
    parts.append(_upright(begin, "command"))
    ended = "given up after" if outcome.total_s is None else "source free after"
    marks = [(outcome.during_s, f"{ended} {outcome.during_s:.1f} s", "end")]
    if outcome.time_to_resume_s is not None:
        marks.insert(0, (outcome.time_to_resume_s, f"resumed after {outcome.time_to_resume_s:.2f} s", "resume"))
    # Labels of near moments stand side by side, and the last one ends at the right edge at the latest.
    widths = [6.6 * len(label) + 12 for _, label, _ in marks]
    places = [scale.x(second) + 1 for second, _, _ in marks]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + widths[index - 1])
    limit = float(WIDTH)
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit - widths[index])
        limit = places[index]
    for place, (second, label, style) in zip(places, marks, strict=True):
        if second <= scale.seconds:
            parts.append(_upright(scale.x(second), style))
        parts.append(f'<text class="mark" x="{place:.1f}" y="{_TOP - 10}">{escape(label)}</text>')
    return parts


def chart(run: Run, evicted: str, scale: Scale) -> str:
    """One arm's chart.

    :param evicted: the VM that moves; the others are its neighbours.
    """
    parts = [*_marks(run, scale), *_axes(scale), _strip(run, scale)]
    parts += [_line(run, vm, scale, "neighbour") for vm in run.traffic.ops if vm != evicted]
    parts.append(_line(run, evicted, scale, "evicted"))
    title = escape(f"{run.name}: answers a second of each VM over time")
    drawn = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>{drawn}</svg>'
