"""What people and agents ask of the engine of a managed guest, and what it answers: JSON over its control socket."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from outboard.errors import UnreachableError, error_of
from outboard.reclaim.controller import MOST_REFAULTS
from outboard.sharing.reads import Watch
from outboard.vmm import sockets

_CONNECT_S = 5.0


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """Put up to ``most`` bytes (None: all) of pages that are idle for ``idle`` seconds (0: any) into a store."""

    to: Literal["pool", "file"] = "file"
    most: int | None = None
    idle: float = 5.0


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Bring every page back, and go on managing the guest."""


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Bring every page back, and let the guest go."""


class Reclaim(msgspec.Struct, frozen=True, tag="reclaim"):
    """Bring the guest's memory down to ``target`` bytes and keep it there; None: no more.

    As long as it does not want back more than ``most_refaults`` pages a second.
    """

    target: int | None
    most_refaults: float = MOST_REFAULTS


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """Take a snapshot; ``incremental``: it goes on from the VM's last one; ``release``: let the guest go afterwards.

    ``blocks``: pages that the VM's disks hold are referred to there.
    """

    incremental: bool = False
    release: bool = False
    blocks: bool = True


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Tell how things are."""


class Learn(msgspec.Struct, frozen=True, tag="learn"):
    """Find out which pages the VM's disks hold, and know it until they are written to; ``moved``: how much that is."""


class Recover(msgspec.Struct, frozen=True, tag="recover"):
    """The memory of ``page`` has failed: put it back as a disk holds it."""

    page: int


class HandOver(msgspec.Struct, frozen=True, tag="hand-over"):
    """Let go of the guest as it is, to a successor."""


class Share(msgspec.Struct, frozen=True, tag="share"):
    """Share pages with the pool of ``domain``: (first page, first slot, how many), those first that shall go first."""

    domain: str
    spans: list[tuple[int, int, int]]


class Unshare(msgspec.Struct, frozen=True, tag="unshare"):
    """Give shared pages memory of their own: runs of them; all, and share no more, when not given."""

    runs: list[tuple[int, int]] | None = None


class DropZeros(msgspec.Struct, frozen=True, tag="drop-zeros"):
    """Give up the memory of those pages, in runs, that are zeros."""

    runs: list[tuple[int, int]]


class Tidy(msgspec.Struct, frozen=True, tag="tidy"):
    """Bring shared pages that were written since back into the guest's file: nothing is saved by them any more."""


class ReadRound(msgspec.Struct, frozen=True, tag="read-round"):
    """End a round of watching how shared pages are read, un-share what is due, and begin the next."""

    watch: Watch | None = None


class Rebuild(msgspec.Struct, frozen=True, tag="rebuild"):
    """Give aligned blocks of 2 MiB, by their numbers, memory of their own again, and make them large pages."""

    blocks: list[int]


Order = (
    Evict
    | Fetch
    | Release
    | Reclaim
    | Snapshot
    | Look
    | Learn
    | Recover
    | HandOver
    | Share
    | Unshare
    | DropZeros
    | Tidy
    | ReadRound
    | Rebuild
)


class Reclaiming(msgspec.Struct, frozen=True):
    """What reclaim aims at: ``goal`` is more than ``target`` while the guest misses its memory; in bytes, pages/s."""

    target: int
    goal: int
    refault_rate: float


class Looked(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.residency.v1"):
    """How things are, after an order was carried out; in bytes, counts and microseconds.

    ``moved``: bytes that the order has moved; ``idle``: that nobody touched when reclaim looked last. ``shared``: bytes
    that are mapped from the pool of ``domain``, of which ``copied`` were written since and are private; ``read_much``:
    pages un-shared for how they were read, by pattern.
    """

    vm: str
    engine: int
    memory: int
    resident: int
    zero: int
    pool: int
    file: int
    disk: int
    snapshot: int
    moved: int
    faults: int
    fault_p50_us: float | None
    fault_p99_us: float | None
    failure: str | None
    shared: int = 0
    copied: int = 0
    domain: str | None = None
    read_much: dict[str, int] = {}
    used: int = 0
    """Bytes of memory that the guest takes now: resident, but for what it never touched."""
    idle: int | None = None
    reclaim: Reclaiming | None = None


class Snapped(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.snapshot.v1"):
    """A snapshot that was taken; in bytes, but for pages.

    ``pause_ms``: how long the VM stood still. ``waited``: pages that it wrote to before they were saved, each of which
    it waited for. ``new``: what is in the file, as it was in memory; ``referred``: what is at the parent or on a disk.
    """

    id: str
    vm: str
    parent: str | None
    memory: int
    zero: int
    new: int
    referred: int
    file: int
    seconds: float
    pause_ms: float
    waited: int


class Failed(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.failed.v1"):
    """An order that could not be carried out."""

    why: str
    exit_code: int


A = TypeVar("A", Looked, Snapped)


def ask(path: Path, order: Order, timeout: float | None = None) -> Looked:
    """Give an order, but for a snapshot, to the engine that listens at ``path``; how things are afterwards.

    :param timeout: seconds until its answer; as long as it takes when not given.
    :raise UnreachableError: nobody listens, or the engine ended meanwhile.
    :raise OutboardError: it could not do that.
    """
    return _ask(path, order, timeout, Looked)


def ask_snapshot(path: Path, order: Snapshot) -> Snapped:
    """Have the engine that listens at ``path`` take a snapshot; errors as :func:`ask`."""
    return _ask(path, order, None, Snapped)


def _ask(path: Path, order: Order, timeout: float | None, kind: type[A]) -> A:
    reached = sockets.connect(path, _CONNECT_S, "the engine of this VM")
    reached.settimeout(None)
    with Connection(reached.detach()) as connection:
        try:
            connection.send_bytes(msgspec.json.encode(order))
            if not connection.poll(timeout):
                raise UnreachableError(f"the engine at {os.fspath(path)} has not answered within {timeout} s")
            answer: Looked | Snapped | Failed = msgspec.json.decode(
                connection.recv_bytes(), type=Looked | Snapped | Failed
            )
        except (EOFError, OSError) as error:
            raise UnreachableError(
                f"the engine at {os.fspath(path)} ended before it answered; no page is lost, the agent starts another"
            ) from error
    if isinstance(answer, Failed):
        raise error_of(answer.exit_code, answer.why)
    if not isinstance(answer, kind):
        raise UnreachableError(f"the engine at {os.fspath(path)} answered an order with {type(answer).__name__}")
    return answer
