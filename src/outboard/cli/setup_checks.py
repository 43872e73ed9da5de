"""The checks of ``outboard doctor`` on how this host has been set up: its file, identity, ports, and VMs.

What has not been set up yet is a note; what has been, and cannot work, is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from outboard.agent.config import AgentConfig, config_dir, read_config, runtime_dir, socket_path, state_dir
from outboard.cli.findings import Finding, Verdict
from outboard.errors import NotFoundError, OutboardError
from outboard.linux import psi
from outboard.stores.reservation import Reservation
from outboard.vmm.guest_agent import GuestAgent
from outboard.vmm.registry import Registry, VmRecord

_AGENT_S = 2.0
_SOON = datetime.timedelta(days=30)


def directories() -> Iterator[Finding]:
    """Where sockets, records and the history are written."""
    for path, holds in ((runtime_dir(), "sockets and records of VMs"), (state_dir(), "the history")):
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        if os.access(nearest, os.W_OK | os.X_OK):
            yield Finding("directory", Verdict.OK, str(path), f"{holds} can be kept")
        else:
            found, follows = f"{nearest} is not writable", f"{holds} cannot be kept"
            yield Finding("directory", Verdict.REFUSED, found, follows, "run as root")


def configuration() -> Iterator[Finding]:
    """The agent's file, and what it names: this host's identity, and ports."""
    path = config_dir() / "agent.toml"
    config = None
    try:
        config = read_config(path)
    except NotFoundError:
        found, mend = f"no {path}", "write it: name, listen, and [hosts]"
        yield Finding("agent.toml", Verdict.NOTE, found, "no agent can start here yet", mend)
    except OutboardError as error:
        yield Finding("agent.toml", Verdict.REFUSED, str(error), "no agent can start here", "correct the file")
    else:
        hosts = ", ".join(sorted(config.hosts)) or "none named"
        yield Finding("agent.toml", Verdict.OK, f"host {config.name}", f"hosts that VMs can go to: {hosts}")
    yield _identity(config_dir() / "pki", config)
    if config is not None:
        yield from _ports(config)


def _identity(directory: Path, config: AgentConfig | None) -> Finding:
    if not directory.exists():
        mend = f"outboard pki init elsewhere, then copy this host's directory to {directory}"
        return Finding("identity", Verdict.NOTE, f"no {directory}", "no agent can start here yet", mend)
    follows = "no other host will speak to this one"
    mend = "outboard pki host makes a new one"
    try:
        name, until = _read_identity(directory)
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        said = str(error) or type(error).__name__
        return Finding("identity", Verdict.REFUSED, f"{directory}: {said}", follows, mend)
    if config is not None and name != config.name:
        found = f"the certificate names {name}, agent.toml {config.name}"
        return Finding("identity", Verdict.REFUSED, found, follows, "make the two names one")
    left = until - datetime.datetime.now(datetime.UTC)
    if left < _SOON:
        expired = left < datetime.timedelta()
        found = f"{name}, {'expired on' if expired else 'expires on'} {until:%Y-%m-%d}"
        return Finding("identity", Verdict.REFUSED if expired else Verdict.NOTE, found, follows, mend)
    if (directory / "key.pem").stat().st_mode & 0o077:
        follows = "whoever reads it can start a QEMU of his choice on the other hosts"
        found, mend = f"{directory / 'key.pem'} can be read by others", f"chmod 600 {directory / 'key.pem'}"
        return Finding("identity", Verdict.REFUSED, found, follows, mend)
    return Finding("identity", Verdict.OK, f"{name}, until {until:%Y-%m-%d}", "other hosts know this one by it")


def _read_identity(directory: Path) -> tuple[str, datetime.datetime]:
    """The host's name and until when the certificate holds.

    :raise ValueError: a file is none of what it should be, or they do not belong together.
    """
    certificate = x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes()))
    key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
    if key.public_key() != certificate.public_key():
        raise ValueError("key.pem is not the key of cert.pem")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = next(iter(names.get_values_for_type(x509.DNSName)), None)
    if host is None:
        raise ValueError("cert.pem names no host")
    return host, certificate.not_valid_after_utc


def _ports(config: AgentConfig) -> Iterator[Finding]:
    file = config_dir() / "agent.toml"
    with socket.socket(socket.AF_UNIX) as probe:
        answers = probe.connect_ex(os.fspath(socket_path())) == 0
    if answers:
        yield Finding("agent", Verdict.OK, f"answers on {socket_path()}", "VMs can go and come")
    elif _free(config.listen, config.port, config.port):
        yield Finding("agent", Verdict.NOTE, "not running", "no VM can go or come until it is", "outboard agent")
    else:
        found, mend = f"{config.listen} port {config.port} is not free", f"see ss -lntp; or change {file}"
        yield Finding("agent", Verdict.REFUSED, found, "no agent can listen there", mend)
    low, high = config.migration_ports
    free = _free(config.listen, low, high)
    found = f"{free} of {high - low + 1} free on {config.listen}"
    if free:
        yield Finding("ports", Verdict.OK, found, "so many VMs at a time can come")
    else:
        yield Finding("ports", Verdict.REFUSED, found, "no VM can come", f"change listen or migration_ports in {file}")


def _free(address: str, low: int, high: int) -> int:
    """How many of the ports can be bound."""
    free = 0
    for port in range(low, high + 1):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            free += 1
    return free


def swap() -> Iterator[Finding]:
    """The swap reservation, if there is to be one; and whether the kernel tells of pressure."""
    try:
        config = read_config(config_dir() / "agent.toml").swap
    except OutboardError:
        # Said already.
        return
    if config is None:
        found, follows = "nothing is reserved", "swap files grow as they can, and a full disk keeps pages in memory"
        yield Finding("swap", Verdict.NOTE, found, follows, "[swap] reservation in agent.toml")
        return
    if not config.place.exists():
        found = f"{config.reservation} are to be reserved in {config.place}"
        yield Finding("swap", Verdict.NOTE, found, "the agent does that as it starts")
    else:
        try:
            with contextlib.closing(Reservation(config.place, config.reservation_bytes, make=False)) as reservation:
                now = reservation.statistics()
        except OutboardError as error:
            mend = "correct [swap] in agent.toml"
            yield Finding("swap", Verdict.REFUSED, str(error), "no VM can be managed here", mend)
            return
        found = f"{now.promisable >> 20} MiB reserved, units are got by {now.way}"
        if now.lost or now.blocks != now.blocks_reserved:
            short = max(now.lost, (now.blocks_reserved - now.blocks) * 512)
            follows = f"{short >> 10} KiB were snatched on a full disk; pages are put into lent units until it has room"
            yield Finding("swap", Verdict.NOTE, found, follows, f"make room on the disk of {config.place}")
        else:
            yield Finding("swap", Verdict.OK, found, "no swap-out can fail for want of room")
    why_not = psi.why_not() if config.pressure else None
    if why_not is not None:
        follows = "memory is reclaimed by outboard reclaim only"
        yield Finding("pressure", Verdict.NOTE, why_not, follows, "psi=1 on the kernel's command line")


def guests() -> Iterator[Finding]:
    """The VMs of this host: whether each can tell which pages matter."""
    for record in Registry(runtime_dir()).list():
        if record.alive:
            yield _hints(record)


def _hints(record: VmRecord) -> Finding:
    check = f"vm {record.name}"
    follows = "migrates without hints: no page is known to be hot or free"
    if record.agent_socket is None:
        return Finding(check, Verdict.NOTE, "started without a guest agent's port", follows, "guest_agent = true")
    deadline = time.monotonic() + _AGENT_S
    try:
        with GuestAgent(record.agent_socket, _AGENT_S) as agent:
            command = "test -r /proc/kpageflags && command -v dd && command -v gzip"
            status, _ = agent.run("/bin/sh", "-c", command, deadline=deadline)
    except OutboardError as error:
        mend = "install and start qemu-guest-agent in the guest, and let it run programs"
        return Finding(check, Verdict.NOTE, str(error), follows, mend)
    if status:
        follows = "its hints are read as a file, which takes longer, or not at all"
        mend = "the guest needs /proc/kpageflags, sh, dd and gzip"
        return Finding(check, Verdict.NOTE, "its agent runs programs, but not dd and gzip", follows, mend)
    return Finding(check, Verdict.OK, "its agent answers, with dd and gzip", "migrates with hints")
