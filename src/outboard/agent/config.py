"""What an agent needs to know of its host; /etc/outboard/agent.toml, strict.

::

    name = "a"                        # this host's name, as in its certificate
    listen = "10.0.0.1"               # where other hosts reach this agent and its migrations
    port = 7849
    migration_ports = [49152, 49215]  # streams of migrations come in on these

    [hosts]                           # the other hosts: name = "address" or "address:port"
    b = "10.0.0.2"
    c = "[fd00::3]:99"                # IPv6, with a port in brackets

    [sharing]                         # domains: VMs that may share pages with one another; else none does
    blue = ["web-1", "web-2"]

The host's identity (key, certificate, the cluster's CA) is /etc/outboard/pki, written by ``outboard pki init``. Three
variables move things: OUTBOARD_CONFIG_DIR (/etc/outboard), OUTBOARD_RUNTIME_DIR (/run/outboard), OUTBOARD_STATE_DIR
(/var/lib/outboard).
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from outboard.errors import NotFoundError, SpecError
from outboard.migrate.desk import Destination
from outboard.vmm.spec import read_toml

PORT = 7849


def config_dir() -> Path:
    """Where configuration and identity are."""
    return Path(os.environ.get("OUTBOARD_CONFIG_DIR", "/etc/outboard"))


def runtime_dir() -> Path:
    """Where sockets and records of what runs are."""
    return Path(os.environ.get("OUTBOARD_RUNTIME_DIR", "/run/outboard"))


def state_dir() -> Path:
    """Where what outlives a reboot is: the history."""
    return Path(os.environ.get("OUTBOARD_STATE_DIR", "/var/lib/outboard"))


def socket_path() -> Path:
    """The agent's local API."""
    return runtime_dir() / "agent.sock"


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's schema."""

    name: str
    listen: str
    port: int = PORT
    migration_ports: tuple[int, int] = (49152, 49215)
    hosts: dict[str, str] = {}
    sharing: dict[str, list[str]] = {}

    def find(self, host: str) -> Destination:
        """Where another host's agent listens.

        :raise NotFoundError: the configuration does not name it.
        :raise SpecError: what it has there is no address.
        """
        try:
            address = self.hosts[host]
        except KeyError:
            known = ", ".join(sorted(self.hosts)) or "none"
            raise NotFoundError(
                f"no host is named {host!r} in {config_dir() / 'agent.toml'} (known: {known}); add it under [hosts]"
            ) from None
        bare, port = _split(address)
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise SpecError(
                f"{config_dir() / 'agent.toml'}: {host} = {address!r} is no address; write it as 10.0.0.2, "
                "10.0.0.2:99, fd00::2 or [fd00::2]:99"
            )
        return Destination(host, bare, int(port or PORT))


def _split(address: str) -> tuple[str, str]:
    """An address, and the port behind it or nothing."""
    if address.startswith("["):
        bare, _, rest = address[1:].partition("]")
        return bare, rest.removeprefix(":")
    if address.count(":") > 1:
        return address, ""
    bare, _, port = address.partition(":")
    return bare, port


def read_config(path: Path) -> AgentConfig:
    """Read an agent's configuration.

    :raise NotFoundError: there is no such file.
    :raise SpecError: it does not fit the schema.
    """
    config = read_toml(path, AgentConfig)
    low, high = config.migration_ports
    if not 0 < low <= high < 65536:
        raise SpecError(f"{path}: migration_ports = [{low}, {high}] is no range of ports")
    return config
