"""The page that compares us with QEMU and libvirt names tests that there are, and leaves no row without an answer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "parity.md"
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_EXCUSES = ("*not yet*", "*no meaning*")


def rows(text: str) -> list[list[str]]:
    """The cells of each row of each table, without the headings."""
    tables = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]
    # A line of dashes ends a heading.
    return [row for row, below in zip(cells, [*cells[1:], [""]], strict=True) if row[0] != "---" and below[0] != "---"]


def missing(text: str) -> list[str]:
    """The tests that a page names and nobody wrote."""
    wanted = {(file, name) for file, name in _NAMED.findall(text)}
    found: set[tuple[str, str]] = set()
    for file in {file for file, _ in wanted}:
        if (ROOT / file).exists():
            tree = ast.parse((ROOT / file).read_text())
            found |= {(file, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)}
    return sorted(f"{file}::{name}" for file, name in wanted - found)


def unanswered(text: str) -> list[str]:
    """The rows that name neither a test nor a reason why there is none."""
    return [
        row[0] for row in rows(text) if not _NAMED.search(row[-1]) and not any(excuse in row[1] for excuse in _EXCUSES)
    ]


def test_every_test_that_is_named_exists() -> None:
    assert missing(PAGE.read_text()) == []


def test_no_row_is_without_a_test_or_a_reason() -> None:
    text = PAGE.read_text()
    assert len(rows(text)) > 50
    assert unanswered(text) == []


@pytest.mark.parametrize("row", ["| `x` | yes | |", "| `x` | yes | tested |"])
def test_a_row_without_an_answer_is_found(row: str) -> None:
    assert unanswered(f"| a | b | c |\n|---|---|---|\n{row}\n") == ["`x`"]


def test_a_test_that_is_gone_is_found() -> None:
    named = "`tests/docs/test_parity.py::test_that_was` `tests/none.py::test_a` `tests/docs/test_parity.py::rows`"
    assert missing(named) == ["tests/docs/test_parity.py::test_that_was", "tests/none.py::test_a"]
