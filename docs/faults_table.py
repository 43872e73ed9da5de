"""Draws the table of faults from the data that the tests run: `python -m docs.faults_table` writes it to migrate.md."""

from __future__ import annotations

from pathlib import Path

from tests.support.matrix import CELLS, Fault, Moment

PAGE = Path(__file__).with_name("migrate.md")
BEGIN, END = "<!-- faults: python -m docs.faults_table writes this -->\n", "<!-- end of faults -->\n"


def draw() -> str:
    """The table as Markdown."""
    lines = ["| | " + " | ".join(moment.value for moment in Moment) + " |", "|---" * (len(Moment) + 1) + "|"]
    for fault in Fault:
        outcomes = [CELLS[moment, fault] for moment in Moment]
        words = [f"{one.exit_code}, {one.place.value.partition(';')[0]}" for one in outcomes]
        lines.append(f"| {fault.value} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def drawn(page: str) -> str:
    """The table that a page holds.

    :raise ValueError: it has no place for one.
    """
    return page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip("\n") + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    at, to = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(f"{text[:at]}\n{draw()}\n{text[to:]}")
