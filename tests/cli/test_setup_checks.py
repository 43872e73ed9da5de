"""The setup's checks: nothing yet is a note, something wrong is a refusal."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from outboard.cli import setup_checks
from outboard.cli.findings import Finding, Verdict
from outboard.stores.reservation import Reservation
from outboard.wire.pki import create_authority, issue_host
from tests.support.requirements import require


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for kind in ("CONFIG", "RUNTIME", "STATE"):
        monkeypatch.setenv(f"OUTBOARD_{kind}_DIR", str(tmp_path / kind.lower()))
    (tmp_path / "config").mkdir()
    return tmp_path


def configure(places: Path, **changed: object) -> None:
    values = {"name": '"a"', "listen": '"127.0.0.1"', "port": "0", **changed}
    (places / "config/agent.toml").write_text("".join(f"{key} = {value}\n" for key, value in values.items()))


def identify(places: Path, name: str = "a", days: int = 100) -> Path:
    create_authority(places / "ca")
    issue_host(places / "ca", places / "config/pki", name, ["127.0.0.1"], days)
    return places / "config/pki"


def found(check: str) -> Finding:
    (one,) = (finding for finding in setup_checks.configuration() if finding.check == check)
    return one


def test_a_swap_reservation_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("block-file-system")
    monkeypatch.setenv("OUTBOARD_CONFIG_DIR", str(tmp_path))
    file = tmp_path / "agent.toml"
    file.write_text('name = "a"\nlisten = "127.0.0.1"\n')
    (finding,) = setup_checks.swap()
    assert (finding.verdict, finding.found) == (Verdict.NOTE, "nothing is reserved")
    place = tmp_path / "swap"
    file.write_text(f'name = "a"\nlisten = "127.0.0.1"\n[swap]\nreservation = "8MiB"\ndirectory = "{place}"\n')
    (finding,) = setup_checks.swap()
    assert "to be reserved in" in finding.found
    Reservation(place, 8 << 20).close()
    (finding,) = setup_checks.swap()
    assert (finding.verdict, "8 MiB reserved, units are got by" in finding.found) == (Verdict.OK, True)
    file.write_text(file.read_text().replace("8MiB", "9MiB"))
    (finding,) = setup_checks.swap()
    assert (finding.verdict, "9 MiB are not reserved" in finding.found) == (Verdict.REFUSED, True)


def test_fresh_host_has_notes_only() -> None:
    findings = [*setup_checks.directories(), *setup_checks.configuration(), *setup_checks.guests()]
    assert {one.verdict for one in findings} == {Verdict.OK, Verdict.NOTE}
    assert found("agent.toml").verdict is found("identity").verdict is Verdict.NOTE


def test_complete_setup_lacks_only_the_running_agent(places: Path) -> None:
    configure(places, migration_ports="[49152, 49155]")
    identify(places)
    notes = [one.check for one in setup_checks.configuration() if one.verdict is not Verdict.OK]
    assert notes == ["agent"]


def test_unknown_key_is_refused(places: Path) -> None:
    configure(places, nam='"b"')
    assert found("agent.toml").verdict is Verdict.REFUSED
    assert "nam" in found("agent.toml").found


def test_running_agent_is_seen(places: Path) -> None:
    configure(places)
    (places / "runtime").mkdir()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(places / "runtime/agent.sock"))
        agent.listen()
        assert found("agent").verdict is Verdict.OK


def test_taken_ports_are_refused(places: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        configure(places, port=port, migration_ports=[port, port])
        assert found("agent").verdict is Verdict.REFUSED
        assert found("ports").verdict is Verdict.REFUSED


def test_identity_of_another_host_is_refused(places: Path) -> None:
    configure(places)
    identify(places, name="b")
    assert found("identity").verdict is Verdict.REFUSED
    assert "names b" in found("identity").found


@pytest.mark.parametrize(("days", "expected"), [(0, Verdict.REFUSED), (10, Verdict.NOTE)])
def test_identity_that_ends_is_told(places: Path, days: int, expected: Verdict) -> None:
    configure(places)
    identify(places, days=days)
    assert found("identity").verdict is expected


def test_key_that_others_can_read_is_refused(places: Path) -> None:
    (identify(places) / "key.pem").chmod(0o644)
    assert found("identity").verdict is Verdict.REFUSED


def test_identity_of_another_cluster_is_refused(places: Path) -> None:
    pki = identify(places)
    create_authority(places / "other")
    (pki / "ca.pem").write_bytes((places / "other/ca.pem").read_bytes())
    assert found("identity").verdict is Verdict.REFUSED


@pytest.mark.parametrize("name", ["key.pem", "cert.pem", "ca.pem"])
def test_identity_with_a_broken_file_is_refused(places: Path, name: str) -> None:
    (identify(places) / name).write_text("nonsense")
    assert found("identity").verdict is Verdict.REFUSED


def test_identity_with_another_key_is_refused(places: Path) -> None:
    pki = identify(places)
    issue_host(places / "ca", places / "second", "a", ["127.0.0.1"])
    (pki / "key.pem").write_bytes((places / "second/key.pem").read_bytes())
    assert "not the key" in found("identity").found
