"""What the agent and its engines say to one another: tasks, and the answers to them."""

from __future__ import annotations

import msgspec

from outboard.agent.domains import Sharing
from outboard.agent.planning import Planning
from outboard.agent.swapping import Swapping
from outboard.migrate.desk import Destination
from outboard.migrate.messages import Prepare
from outboard.migrate.method import Options


class Depart(msgspec.Struct, frozen=True, tag="depart"):
    """Migrate a VM of this host (``source``) away; ``began`` is when the agent was told to, CLOCK_MONOTONIC.

    ``again``: in the place of an engine that died after the commit.
    """

    migration: str
    vm: str
    source: str
    destination: Destination
    options: Options
    began: float
    throttle_gain: float
    again: bool = False


class Receive(msgspec.Struct, frozen=True, tag="receive"):
    """Take in a VM from ``source``; ``again``: in the place of an engine that died when the VM was here already."""

    source: str
    listen: str
    ports: tuple[int, int]
    prepare: Prepare
    verdicts: str
    again: bool = False


class Manage(msgspec.Struct, frozen=True, tag="manage"):
    """Manage the memory of a VM of this host; ``successor``: take it over from the engine that does."""

    vm: str
    swap: Swapping
    successor: bool


class Restore(msgspec.Struct, frozen=True, tag="restore"):
    """Begin the VM ``vm`` with what a snapshot has, and manage it; ``eager``: bring all its pages in before it runs.

    ``spec`` is what the snapshot says of the VM.
    """

    vm: str
    snapshot: str
    spec: str
    swap: Swapping
    eager: bool


Task = Depart | Receive | Manage | Restore | Planning | Sharing


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An engine that could not even begin, and why."""

    why: str
    exit_code: int


class Managing(msgspec.Struct, frozen=True, tag="managing"):
    """A managing engine serves."""

    engine: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """An incoming engine listens."""

    port: int
    tokens: dict[str, str]


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """An incoming engine has ended; None when all went well."""

    why: str | None
