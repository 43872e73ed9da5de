"""Names that certificates are made for: a host's own, never a pattern."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography import x509

from outboard.errors import NotFoundError, UsageError
from outboard.wire.pki import create_authority, issue_host


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki") / "ca"
    create_authority(directory)
    return directory


@pytest.mark.parametrize(
    "name", ["", ".", "-", "a..b", "a-.b", "a b", "../x", "*", "*.lan", "é", "a\n", "a" * 64, "a_b"]
)
def test_what_is_no_host_name_is_refused(authority: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no host name"):
        issue_host(authority, tmp_path / "host", name, [])
    with pytest.raises(UsageError, match="no host name"):
        issue_host(authority, tmp_path / "host", "a", [name])
    assert not (tmp_path / "host").exists()


def test_the_certificate_names_the_host_first_and_then_its_addresses(authority: Path, tmp_path: Path) -> None:
    issue_host(authority, tmp_path, "a-1.rack.lan", ["10.0.0.1", "fd00::1", "a-1"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "cert.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["a-1.rack.lan", "10.0.0.1", "fd00::1", "a-1"]


def test_no_authority(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="outboard pki init"):
        issue_host(tmp_path, tmp_path / "host", "a", [])


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nrubbish\n-----END PRIVATE KEY-----\n"])
@pytest.mark.parametrize("file", ["ca-key.pem", "ca.pem"])
def test_a_damaged_authority(authority: Path, tmp_path: Path, file: str, content: bytes) -> None:
    damaged = tmp_path / "ca"
    shutil.copytree(authority, damaged)
    (damaged / file).write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        issue_host(damaged, tmp_path / "host", "a", ["127.0.0.1"])
    assert not list(tmp_path.glob("host/*"))
