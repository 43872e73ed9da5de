"""The worker that asks the guest: each piece is ranked before it is named, and there is always a last word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from outboard.migrate import ranking
from outboard.migrate.hinting import Classed, Told, ask, decode_hint
from outboard.migrate.outbox import Outbox
from outboard.migrate.turns import NEVER
from outboard.migrate.worker import Worker
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import QemuGuest
from tests.support.fake_agent import FakeAgent, Twist, honest

PAGES = 1 << 17
FREE, SLAB, TABLE = 1 << 10, 1 << 7, 1 << 26
PATH = "/proc/kpageflags"


def guest_at(path: Path | None) -> QemuGuest:
    return cast(
        QemuGuest, SimpleNamespace(name="web", agent_path=path, regions=[SimpleNamespace(first=0, pages=PAGES, gpa=0)])
    )


def outbox_of(unpopulated: slice) -> Outbox:
    outbox = Outbox(PAGES)
    populated = np.ones(PAGES, dtype=np.bool_)
    populated[unpopulated] = False
    ranking.rank_all(outbox, PageSet.from_mask(populated))
    return outbox


def hear(guest: QemuGuest, outbox: Outbox) -> tuple[list[Classed], str]:
    """What the worker says, until its last word."""
    worker = Worker("test-hints", lambda link: ask(guest, outbox, link))
    pieces: list[Classed] = []
    try:
        while True:
            report = worker.hear(20)
            assert report is not None
            match decode_hint.decode(report):
                case Classed() as piece:
                    pieces.append(piece)
                case Told(words):
                    return pieces, words
    finally:
        worker.end()


def flags() -> bytes:
    found = np.full(PAGES, FREE, dtype="<u8")
    found[100:200] = SLAB
    found[-1] = TABLE
    return found.tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent"


def test_what_the_guest_tells_is_ranked(path: Path) -> None:
    outbox = outbox_of(slice(150, 160))
    with FakeAgent(path, {PATH: flags()}):
        pieces, words = hear(guest_at(path), outbox)
    assert [piece.first for piece in pieces] == [0, 1 << 15]
    assert sum(piece.count for piece in pieces) == PAGES
    assert words.startswith(f"guest agent: {PAGES} pages classed in ")
    assert np.all(outbox.rank[100:150] <= ranking.EARLY_UPTO)
    assert np.all(outbox.rank[150:160] == NEVER)
    # Up to 256 is the PC's hole for devices.
    assert np.all(outbox.rank[256:-1] == NEVER)
    assert outbox.rank[-1] < outbox.rank[100]


def test_a_guest_without_an_agent() -> None:
    pieces, words = hear(guest_at(None), outbox_of(slice(0)))
    assert (pieces, words) == ([], "none: the VM has no guest agent")


def test_an_agent_that_is_not_there(path: Path) -> None:
    outbox = outbox_of(slice(0))
    pieces, words = hear(guest_at(path), outbox)
    assert not pieces
    assert words.startswith("none: ")
    assert np.all(outbox.rank == ranking.UNCLASSED)


def test_an_agent_that_falls_silent_after_its_first_words(path: Path) -> None:
    """What it told counts; the rest is sent as pages of which nothing is known."""
    asked = 0

    def once(command: str, answer: bytes) -> bytes | None:
        nonlocal asked
        asked += command == "guest-exec"
        return answer if asked <= 1 else b'{"error": {"desc": "enough"}}\n'

    outbox = outbox_of(slice(0))
    twist: Twist = once
    with FakeAgent(path, {PATH: flags()}, twist=twist):
        pieces, words = hear(guest_at(path), outbox)
    assert pieces == [Classed(0, 1 << 15)]
    assert words.startswith(f"{1 << 15} pages classed, then none: ")
    assert np.all(outbox.rank[1 << 15 :] == ranking.UNCLASSED)


def test_an_agent_that_has_nothing_to_tell(path: Path) -> None:
    with FakeAgent(path, {PATH: b""}, twist=honest):
        pieces, words = hear(guest_at(path), outbox_of(slice(0)))
    assert not pieces
    assert "is empty" in words
