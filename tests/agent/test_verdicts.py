"""Commit and refusal exclude each other, whoever races for them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outboard.agent.verdicts import Verdicts
from outboard.errors import NotAuthorisedError, PeerError


def test_the_first_verdict_stands(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "incoming")
    assert verdicts.commit("one")
    assert not verdicts.refuse("one")
    assert verdicts.commit("one")
    assert verdicts.refuse("two")
    assert not verdicts.commit("two")
    assert verdicts.refuse("two")
    assert not Verdicts(tmp_path / "incoming").commit("two")


def test_of_many_who_race_all_agree(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            tried = [(name, pool.submit(getattr(verdicts, name), f"m{number}")) for name in ("commit", "refuse") * 4]
        won = {name for name, one in tried if one.result()}
        assert len(won) == 1
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".verdict"]


def test_only_the_source_of_a_migration_may_ask(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    with pytest.raises(NotAuthorisedError):
        verdicts.coming("one", "a")
    verdicts.expect("one", "a", "web")
    assert verdicts.coming("one", "a") == "web"
    for migration, source in (("one", "b"), ("two", "a")):
        with pytest.raises(NotAuthorisedError):
            verdicts.coming(migration, source)


@pytest.mark.parametrize("migration", ["", "..", "../one", "a/b", "x" * 65, "one.json", "\n"])
def test_what_is_no_id_makes_no_file(migration: str, tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "incoming")
    with pytest.raises(PeerError):
        verdicts.expect(migration, "a", "web")
    with pytest.raises(PeerError):
        verdicts.refuse(migration)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_the_end_is_kept_for_whoever_asks_again(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.expect("one", "a", "web")
    assert verdicts.arrived("one") is None
    verdicts.note_arrived("one", b"{}")
    assert verdicts.arrived("one") == b"{}"


def test_what_is_a_month_old_is_forgotten(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.expect("old", "a", "web")
    verdicts.commit("old")
    long_ago = time.time() - 40 * 86_400
    for file in tmp_path.iterdir():
        os.utime(file, (long_ago, long_ago))
    verdicts.expect("new", "a", "web")
    assert {file.name for file in tmp_path.iterdir()} == {"new.json"}
