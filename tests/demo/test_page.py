"""The report: everything of the session is on it and nothing from elsewhere."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from demo.document import Document, load, save
from demo.page import render
from demo.table import show
from tests.demo.recorded import document, run

VOID = {"meta", "br"}


@pytest.fixture
def session() -> Document:
    return document(
        [
            run("outboard-enlightened", 3.4, 0.4),
            run("qemu-post-copy-preempt", 7.1, 0.3),
            run("qemu-pre-copy", None, None),
            run("outboard-enlightened", 3.6, 0.5),
            run("outboard-enlightened", 3.2, 0.3),
            run("outboard-enlightened", 6.2, 0.3, churned=False),
        ]
    )


class Balance(HTMLParser):
    """Fails when a tag is closed that is not open, or one stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 (its interface)
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_stands_alone(session: Document) -> None:
    html = render(session, "web")
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert parser.seen.count("svg") == len(session.arms) == 4
    assert not re.search(r"(src|href)=|url\(|https?:|@import|<script", html)


def test_the_page_names_every_arm_and_what_became_of_it(session: Document) -> None:
    html = render(session, "web")
    for name in ("outboard-enlightened", "outboard-enlightened (unchurned)", "qemu-post-copy-preempt", "qemu-pre-copy"):
        assert f"<td>{name}</td>" in html
    assert "did not converge" in html
    assert "3.20 to 3.60" in html
    assert "given up after" in html


def test_all_charts_have_one_scale(session: Document) -> None:
    labels = [
        re.findall(r'class="tick"[^>]*>([^<]*)<', svg) for svg in re.findall(r"<svg.*?</svg>", render(session, "web"))
    ]
    assert len(labels) == 4
    assert all(own == labels[0] for own in labels)


def test_the_table_says_the_same(session: Document) -> None:
    console = Console(file=io.StringIO(), width=220)
    show(session, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "(unchurned)" in text
    assert "3.40" in text
    assert "3.20 to 3.60" in text
    assert "did not converge" in text


def test_the_document_survives_its_file(session: Document, tmp_path: Path) -> None:
    save(session, tmp_path / "session.json")
    assert load(tmp_path / "session.json") == session
