"""The cluster's certificate authority and its hosts' certificates: EC P-256, made with the cryptography library."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outboard.errors import NotFoundError, RefusedError, UsageError

_CA_DAYS = 3650
_HOST_DAYS = 825
_HOST_NAME = re.compile(r"(?=.{1,64}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I)
"""RFC 1123; at most 64 characters, as X.520 has it for a common name. No wildcard: a certificate is one host's."""
_SKEW = datetime.timedelta(hours=1)
"""Clocks of hosts differ: certificates begin to hold an hour before they are made."""


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write_new(path: Path, content: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _refuse_existing(directory: Path, *names: str) -> None:
    for name in names:
        if (directory / name).exists():
            raise RefusedError(
                "exists", f"{directory / name} exists; keys are not overwritten: choose another directory"
            )


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _SKEW)
        .not_valid_after(end)
    )


def create_authority(directory: Path) -> None:
    """Make a CA: ``ca-key.pem`` (mode 0600) and ``ca.pem`` in ``directory``.

    :raise RefusedError: ``exists``: there is one already.
    """
    _refuse_existing(directory, "ca-key.pem", "ca.pem")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Outboard cluster CA")
    certificate = (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_new(directory / "ca-key.pem", _key_bytes(key), 0o600)
    _write_new(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _dns_name(name: str) -> x509.DNSName:
    if not _HOST_NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no host name: at most 64 letters, digits, - and .")
    return x509.DNSName(name)


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return _dns_name(address)


def issue_host(authority: Path, directory: Path, name: str, addresses: list[str], days: int = _HOST_DAYS) -> None:
    """Issue a host's identity: ``key.pem`` (mode 0600), ``cert.pem`` and ``ca.pem`` in ``directory``.

    :param name: the host's name, by which other hosts know it; :param addresses: IP addresses or further DNS names.
    :raise NotFoundError: no CA in ``authority``; :raise RefusedError: ``exists``; :raise UsageError: one is no name.
    """
    names = [_dns_name(name), *map(_general_name, addresses)]
    _refuse_existing(directory, "key.pem", "cert.pem")
    try:
        signer = serialization.load_pem_private_key((authority / "ca-key.pem").read_bytes(), None)
        root = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
    except OSError as error:
        raise NotFoundError(f"no cluster CA in {authority}: {error}; make one with outboard pki init") from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the cluster CA in {authority} cannot be read: {error}; restore ca-key.pem and ca.pem, unencrypted"
        ) from error
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{authority / 'ca-key.pem'} holds no key of a CA that Outboard made")
    key = ec.generate_private_key(ec.SECP256R1())
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(_name(name), root.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_new(directory / "key.pem", _key_bytes(key), 0o600)
    _write_new(directory / "cert.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    (directory / "ca.pem").write_bytes(root.public_bytes(serialization.Encoding.PEM))
