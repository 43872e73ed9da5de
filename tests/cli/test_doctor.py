"""outboard doctor: what it prints and how it exits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from outboard.cli import doctor
from outboard.cli.findings import Finding, Verdict
from outboard.errors import RefusedError

FINE = Finding("kernel", Verdict.OK, "all of it", "works")
LESS = Finding("kvm", Verdict.NOTE, "none", "slow", "switch it on")
BROKEN = Finding("qemu", Verdict.REFUSED, "none", "nothing runs", "install it")


def run(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *arguments: str) -> tuple[str, BaseException | None]:
    def check() -> Iterator[Finding]:
        yield from findings

    monkeypatch.setattr(doctor, "_CHECKS", (check,))
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(doctor.doctor, [*arguments], standalone_mode=False)
    return done.output, done.exception


def test_notes_are_no_refusal_and_say_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    output, failure = run(monkeypatch, [FINE, LESS])
    assert failure is None
    assert "to mend: switch it on" in output
    assert output.count("to mend") == 1


def test_refusal_names_the_checks_and_exits_with_4(monkeypatch: pytest.MonkeyPatch) -> None:
    output, failure = run(monkeypatch, [FINE, BROKEN])
    assert isinstance(failure, RefusedError)
    assert failure.exit_code == 4
    assert str(failure).endswith(": qemu")
    assert "install it" in output


@pytest.mark.parametrize(("last", "able"), [(LESS, True), (BROKEN, False)])
def test_json_has_every_finding(monkeypatch: pytest.MonkeyPatch, last: Finding, able: bool) -> None:
    output, _ = run(monkeypatch, [FINE, last], "-o", "json")
    found = json.loads(output)
    assert found["schema"] == "outboard.doctor.v1"
    assert found["able"] is able
    assert [one["verdict"] for one in found["findings"]] == ["ok", last.verdict.value]
    assert set(found["findings"][0]) == {"check", "verdict", "found", "follows", "mend"}
