"""outboard migrate --plan: how a plan is shown."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from outboard.cli.output import print_json, print_table, size_text
from outboard.errors import RefusedError
from outboard.migrate.plan import Plan, Range
from outboard.pages import PAGE_SIZE


def show_plan(answer: Any, output: str) -> None:
    """Print a plan as the agent has it.

    :raise RefusedError: something stands in the way; the first thing's reason and words.
    """
    plan = msgspec.convert(answer, type=Plan)
    if output == "table":
        _print(plan)
    else:
        print_json(plan)
    if plan.blockers:
        first = plan.blockers[0]
        raise RefusedError(first.reason, f"{plan.vm} cannot be moved to {plan.destination}: {first.words}")


def _span(span: Range, unit: str, scale: float = 1.0, digits: int = 0) -> str:
    low = f"{span.low * scale:.{digits}f}"
    return f"{low} {unit} or more" if span.high is None else f"{low} to {span.high * scale:.{digits}f} {unit}"


def _sizes(span: Range) -> str:
    if span.high is None:
        return f"{size_text(span.low)} or more"
    low, high = size_text(span.low), size_text(span.high)
    return low if low == high else f"{low} to {high}"


def _pages(span: Range) -> str:
    return _sizes(Range(span.low * PAGE_SIZE, None if span.high is None else span.high * PAGE_SIZE))


def _print(plan: Plan) -> None:
    click.echo(f"{plan.vm} from {plan.source} to {plan.destination}: nothing was moved")
    watched = plan.watched
    if watched is not None:
        free = f", of that {_pages(watched.free_data)} free" if watched.free_data.high else ""
        small = "" if watched.compressed is None else f"; zlib makes {watched.compressed:.0%} of it"
        click.echo(
            f"memory    {size_text(watched.pages * PAGE_SIZE)}: {_pages(watched.data)} data{free}, "
            f"{_pages(watched.zero)} zeros{small}"
        )
        if watched.on_disk is not None:
            click.echo(f"disks     {_pages(watched.on_disk)} of the data, which need not go where both hosts have them")
        click.echo(f"hints     {watched.hints}")
        if watched.growth:
            (soon, first), (late, last) = watched.growth[0], watched.growth[-1]
            click.echo(
                f"writes    {size_text(first * PAGE_SIZE / soon)}/s at first, to {size_text(last * PAGE_SIZE)} within "
                f"{late:.1f} s"
            )
    if plan.link is not None:
        click.echo(f"link      {_sizes(plan.link.rate)} a second, by {plan.link.known_from}")
    if plan.expected:
        rows = [
            [
                f"{one.method.value}{' *' if one.method is plan.recommended else ''}",
                _span(one.total_s, "s", digits=1),
                _span(one.resume_s, "s", digits=1),
                _span(one.blackout_ms, "ms"),
                _sizes(one.bytes),
            ]
            for one in plan.expected
        ]
        print_table(["method", "total", "to the resume", "blackout", "sent"], rows, empty="")
        for one in plan.expected:
            click.echo(f"{one.method.value:<11} {one.verdict}")
    if plan.recommended is not None:
        click.echo(f"*           {plan.recommended.value}: {plan.why}")
    for blocker in plan.blockers:
        click.echo(f"blocked   at {blocker.at} ({blocker.reason}): {blocker.words}")
