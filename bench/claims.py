"""Claims: a figure of ours beside its peer's, against a bar; missed ones are told like met ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Claim(msgspec.Struct, kw_only=True):
    """One claim.

    :ivar ours: median over the runs.
    :ivar peer: the peer's median; None where the bar is on our figure alone.
    :ivar ratio: ours by the peer's.
    :ivar bar: what the ratio, or our figure where there is no peer, may be at most (at least, if ``at_least``).
    :ivar spread: our least and most.
    """

    name: str
    ours: float | None
    peer: float | None
    ratio: float | None
    bar: float
    unit: str
    runs: int
    at_least: bool = False
    met: bool = False
    spread: tuple[float, float] | None = None
    against: str = ""


def claim(
    name: str,
    ours: float | None,
    bar: float,
    unit: str,
    runs: int,
    *,
    peer: float | None = None,
    against: str = "",
    spread: tuple[float, float] | None = None,
    at_least: bool = False,
) -> Claim:
    """Judge a figure; one that is missing is missed.

    :param against: whose figure *peer* is; empty where the bar is on ours alone.
    """
    ratio = ours / peer if ours is not None and peer else None
    judged = ratio if against else ours
    met = judged is not None and (judged >= bar if at_least else judged <= bar)
    return Claim(
        name=name,
        ours=ours,
        peer=peer,
        ratio=ratio,
        bar=bar,
        unit=unit,
        runs=runs,
        at_least=at_least,
        met=met,
        spread=spread,
        against=against,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def publish(claims: list[Claim], file: Path | None, console: Console) -> None:
    """Print the claims and, given a file, write them there as a JSON list."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("claim", "ours", "least to most", "peer", "ratio", "bar", "runs", "met"):
        table.add_column(heading, justify="left" if heading in ("claim", "met") else "right")
    for each in claims:
        sign = "≥" if each.at_least else "≤"
        table.add_row(
            f"{each.name}{f' against {each.against}' if each.against else ''}",
            f"{_number(each.ours)} {each.unit}",
            "" if each.spread is None else f"{_number(each.spread[0])} to {_number(each.spread[1])}",
            "" if not each.against else f"{_number(each.peer)} {each.unit}",
            "" if not each.against else _number(each.ratio),
            f"{sign} {_number(each.bar)}",
            str(each.runs),
            Text("yes", style="green") if each.met else Text("MISSED", style="bold red"),
        )
    console.print(table)
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(claims), indent=1))
