"""Claims: who is judged against what, and that a missing figure is a missed claim."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.claims import Claim, claim, publish
from bench.evict import claims_of
from bench.sessions import against, alone
from tests.demo.recorded import document, run


def test_a_ratio_is_judged_where_there_is_a_peer() -> None:
    assert claim("t", 3.0, 0.5, "s", 3, peer=7.0, against="qemu").met
    assert not claim("t", 4.0, 0.5, "s", 3, peer=7.0, against="qemu").met
    assert claim("t", 4.0, 0.5, "s", 3, peer=7.0, against="qemu").ratio == pytest.approx(4 / 7)


def test_the_figure_is_judged_where_there_is_none() -> None:
    assert claim("blackout", 30, 35, "ms", 3).met
    assert not claim("blackout", 36, 35, "ms", 3).met
    assert claim("share", 0.9, 0.8, "", 3, at_least=True).met
    assert not claim("share", 0.7, 0.8, "", 3, at_least=True).met


def test_what_is_missing_is_missed() -> None:
    assert not claim("t", None, 0.5, "s", 0, peer=7.0, against="qemu").met
    assert not claim("t", 3.0, 0.5, "s", 3, peer=None, against="qemu").met
    assert not claim("blackout", None, 35, "ms", 0).met


def test_claims_from_a_session() -> None:
    session = document(
        [
            run("outboard-enlightened", 3.4, 0.4),
            run("outboard-enlightened", 3.6, 0.5),
            run("outboard-enlightened", 3.2, 0.3),
            run("qemu-post-copy-preempt", 7.1, 0.3),
            run("qemu-post-copy", 6.8, 1.0),
            run("qemu-pre-copy", None, None),
        ]
    )
    total = against(session, "total", "total_s", "qemu-post-copy-preempt", 0.5, "s")
    assert (total.ours, total.peer, total.spread, total.runs, total.met) == (3.4, 7.1, (3.2, 3.6), 3, True)
    fastest = against(
        session, "total", "total_s", ("qemu-post-copy-preempt", "qemu-post-copy", "qemu-pre-copy"), 0.5, "s"
    )
    assert fastest.against == "qemu-post-copy"
    assert not against(session, "total", "total_s", "qemu-pre-copy", 0.5, "s").met
    assert alone(session, "worst", "time_to_resume_s", 0.45, "s", worst=True).ours == 0.5
    missed = [each for each in claims_of(session) if not each.met]
    assert {"total time", "remote faults, p50", "remote faults, p99"} <= {each.name for each in missed}


def test_the_file_holds_missed_claims_too(tmp_path: Path) -> None:
    claims = [claim("t", 3.0, 0.5, "s", 3, peer=7.0, against="qemu"), claim("u", None, 1, "ms", 0)]
    console = Console(file=io.StringIO(), width=160)
    publish(claims, tmp_path / "claims.json", console)
    written = msgspec.json.decode((tmp_path / "claims.json").read_bytes(), type=list[Claim])
    assert written == claims
    plain = msgspec.json.decode((tmp_path / "claims.json").read_bytes())
    assert {"name", "ours", "peer", "ratio", "bar", "unit", "runs"} <= set(plain[0])
    assert isinstance(console.file, io.StringIO)
    assert "MISSED" in console.file.getvalue()
