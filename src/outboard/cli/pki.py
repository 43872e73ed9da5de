"""outboard pki: the cluster's certificate authority and the hosts' certificates."""

from __future__ import annotations

from pathlib import Path

import click

from outboard.errors import UsageError
from outboard.wire.pki import create_authority, issue_host


@click.group()
def pki() -> None:
    """Make the certificates that hosts know one another by."""


@pki.command(epilog="Example: outboard pki init cluster --host a=10.0.0.1 --host b=10.0.0.2")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME=ADDRESS[,ADDRESS]", help="Issue a certificate; repeatable."
)
def init(directory: Path, hosts: tuple[str, ...]) -> None:
    """Make a new cluster CA in DIRECTORY/ca, and each host's identity in DIRECTORY/NAME.

    Copy DIRECTORY/NAME to /etc/outboard/pki on that host; keep DIRECTORY/ca off the hosts.
    """
    parsed = [_parse(host) for host in hosts]
    create_authority(directory / "ca")
    click.echo(f"cluster CA: {directory / 'ca'}")
    for name, addresses in parsed:
        _issue(directory, name, addresses)


@pki.command(epilog="Example: outboard pki host cluster c=10.0.0.3")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("host", metavar="NAME=ADDRESS[,ADDRESS]")
def host(directory: Path, host: str) -> None:
    """Issue one more host's identity from the CA in DIRECTORY/ca."""
    _issue(directory, *_parse(host))


def _parse(host: str) -> tuple[str, list[str]]:
    name, equals, addresses = host.partition("=")
    if not (name and equals and addresses):
        raise UsageError(f"--host {host}: write it as NAME=ADDRESS, such as a=10.0.0.1")
    return name, addresses.split(",")


def _issue(directory: Path, name: str, addresses: list[str]) -> None:
    issue_host(directory / "ca", directory / name, name, addresses)
    click.echo(f"host {name} ({', '.join(addresses)}): {directory / name}")
