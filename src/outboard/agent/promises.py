"""What this host has promised its VMs of the swap reservation, and the check at the start of another."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from outboard.agent.config import AgentConfig, config_dir, read_config
from outboard.errors import NotFoundError, OutboardError
from outboard.pages import PAGE_SIZE
from outboard.reclaim.pools import Pools, Promise
from outboard.stores.moving import UNIT
from outboard.vmm.registry import Registry
from outboard.vmm.spec import VmSpec, parse_spec

_LOCK = "admission.lock"


def configured() -> AgentConfig | None:
    """This host's configuration; None where it has not been set up."""
    try:
        return read_config(config_dir() / "agent.toml")
    except NotFoundError:
        return None


def pools_of(config: AgentConfig) -> Pools | None:
    """The pools; None where no swap is reserved."""
    return None if config.swap is None else Pools(config.swap.reservation_bytes, config.pools)


def promise_of(spec: VmSpec) -> Promise:
    """What a VM could have swapped out, in whole units; nothing where its pages are too large for that."""
    size = spec.reclaimable_bytes if spec.page_bytes == PAGE_SIZE else 0
    return Promise(spec.pool or "", -(-size // UNIT) * UNIT)


def promises(registry: Registry) -> dict[str, Promise]:
    """What every VM that runs here could have swapped out."""
    found = {}
    for record in registry.list():
        if record.alive:
            # One that ends this very moment takes its description with it.
            with contextlib.suppress(FileNotFoundError, OutboardError):
                found[record.name] = promise_of(parse_spec(record.spec_text(), f"the spec of {record.name}"))
    return found


@contextlib.contextmanager
def admitted(spec: VmSpec, registry: Registry) -> Iterator[None]:
    """Start a VM inside: it is counted by the time the next one is looked at.

    :raise RefusedError: ``swap-reservation``, ``no-pool``: it could outgrow what is reserved on this host.
    """
    config = configured()
    pools = None if config is None else pools_of(config)
    if pools is None:
        yield
        return
    registry.root.mkdir(parents=True, exist_ok=True)
    lock = os.open(registry.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pools.admit(spec.name, promise_of(spec), promises(registry))
        yield
    finally:
        os.close(lock)
