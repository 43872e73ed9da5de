"""How commands print: a table for people, JSON with a schema's name for programs; and how units are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

C = TypeVar("C", bound=Callable[..., Any])


def output_option(*formats: str) -> Callable[[C], C]:
    """The option ``-o``; the first format is the default."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        show_default=True,
        help="How to print.",
    )


def print_json(value: Any) -> None:
    """One JSON object a line."""
    click.echo(msgspec.json.encode(value).decode())


def print_table(columns: list[str], rows: list[list[str]], *, empty: str) -> None:
    """A table without frames; ``empty`` is said when there are no rows."""
    if not rows:
        click.echo(empty)
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


_RATES = {"kbit": 125, "mbit": 125_000, "gbit": 125_000_000, "kb": 1_000, "mb": 1_000_000, "gb": 1_000_000_000}
"""Bytes/s in one unit."""


class Bandwidth(click.ParamType[int]):
    """``1Gbit``, ``500Mbit``, ``100MB``: a rate, as bytes/s."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg](?:bit|b))(?:/s)?", str(value).strip(), re.IGNORECASE)
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no rate; write it as 1Gbit, 500Mbit or 100MB (bytes) a second", param, ctx)
        return int(float(match[1]) * _RATES[match[2].lower()])


class Duration(click.ParamType[float]):
    """``300ms`` or ``1.5s``, as seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no time; write it as 300ms or 1.5s", param, ctx)
        return float(match[1]) * (0.001 if match[2] == "ms" else 1)


def size_text(octets: float) -> str:
    """Bytes for people: ``356 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 1000:
            return f"{octets:.3g} {unit}" if octets < 100 else f"{octets:.0f} {unit}"
        octets /= 1000
    return f"{octets:.3g} TB"
