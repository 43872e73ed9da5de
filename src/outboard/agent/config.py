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
    [swap]                            # without it each VM's swap file grows as it can
    reservation = "8GiB"              # allocated on the disk at once
    directory = "/var/lib/outboard/swap"
    pressure = true                   # reclaim memory when tasks of this host wait for it (false)
    thin = false                      # on ext4 pages go into the reservation itself, which is faster (true)

    [pools.prod]                      # parts of the reservation; VMs name theirs
    reservation = "4GiB"
    limit = "6GiB"
    shares = 2000                     # 1000

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
from outboard.reclaim.pools import Pool, Pools
from outboard.vmm.spec import MIB, parse_size, read_toml

PORT = 7849


def config_dir() -> Path:
    """Where configuration and identity are."""
    return Path(os.environ.get("OUTBOARD_CONFIG_DIR", "/etc/outboard"))


def runtime_dir() -> Path:
    """Where sockets and records of what runs are."""
    return Path(os.environ.get("OUTBOARD_RUNTIME_DIR", "/run/outboard"))


def state_dir() -> Path:
    """Where what outlives a reboot is: the history, the snapshots."""
    return Path(os.environ.get("OUTBOARD_STATE_DIR", "/var/lib/outboard"))


def snapshot_dir() -> Path:
    """The snapshots of this host's VMs."""
    return state_dir() / "snapshots"


def socket_path() -> Path:
    """The agent's local API."""
    return runtime_dir() / "agent.sock"


class Swap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table of the reservation, and of when to reclaim by oneself.

    ``stall_ms``: how long tasks wait for memory, of every two seconds, before any is reclaimed.
    """

    reservation: str
    directory: str | None = None
    pressure: bool = False
    stall_ms: int = 100
    thin: bool = True

    def __post_init__(self) -> None:
        if parse_size(self.reservation) % MIB:
            raise ValueError(f"reservation = {self.reservation!r}: must be whole MiB")
        if self.directory is not None and not self.directory.startswith("/"):
            raise ValueError(f"directory = {self.directory!r}: must be an absolute path")
        if not 0 < self.stall_ms < 2000:
            raise ValueError(f"stall_ms = {self.stall_ms}: must be 1 to 1999")

    @property
    def reservation_bytes(self) -> int:
        """Its size."""
        return parse_size(self.reservation)

    @property
    def place(self) -> Path:
        """Where it is."""
        return state_dir() / "swap" if self.directory is None else Path(self.directory)


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's schema."""

    name: str
    listen: str
    port: int = PORT
    migration_ports: tuple[int, int] = (49152, 49215)
    hosts: dict[str, str] = {}
    sharing: dict[str, list[str]] = {}
    swap: Swap | None = None
    pools: dict[str, Pool] = {}

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
    if config.swap is not None:
        Pools(config.swap.reservation_bytes, config.pools)
    elif config.pools:
        raise SpecError(f"{path}: there are pools, but nothing is reserved for them; add [swap] with a reservation")
    return config
