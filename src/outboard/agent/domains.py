"""The process of a sharing domain: scans its guests again and again, and tells their engines what to share.

It reads guests through their files, and changes nothing itself: an engine that is told to share compares first, and
keeps its own journal. So this process may die at any instant: what is shared stays shared, and the next process of the
domain finds in the engines' journals which slots of the pool are in use. Its directory, RUNTIME/sharing/DOMAIN:

============  ==========================================================================
pool          the shared pages; in /dev/shm where the runtime directory is not on tmpfs
lock          held (flock(2)) by the process
domain.json   what it was started with; there while the domain is to share
control.sock  where it takes orders: JSON, each with a length before it
============  ==========================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from outboard.agent.clients import Clients
from outboard.agent.holding import CONTROL
from outboard.agent.manager import LAYOUT
from outboard.agent.orders import DropZeros, Failed, Look, Looked, ReadRound, Rebuild, Share, Tidy, Unshare, ask
from outboard.agent.orders import Order as EngineOrder
from outboard.agent.sharer import domain_directory, pool_path
from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError, UnreachableError, error_of
from outboard.linux import proc, psi
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.residency import Residency, Where
from outboard.sharing.domain import Domain, Found, Spans
from outboard.sharing.inside import Pressure, Thresholds, plenty, tlb_cost, wanted
from outboard.sharing.pool import Pool
from outboard.sharing.reads import Watch
from outboard.sharing.scan import SECRET
from outboard.vmm import sockets
from outboard.vmm.large_pages import large_mappings
from outboard.vmm.layout import Layout
from outboard.vmm.registry import Registry, VmRecord

WANTED = "domain.json"
_LOCK = "lock"
_SPANS = 4096
"""Spans and runs of one order: an engine does nothing else meanwhile but serve faults."""
_CONNECT_S = 5.0

log = structlog.get_logger()
Piece = TypeVar("Piece", Spans, Runs)


class Sharing(msgspec.Struct, frozen=True, tag="sharing"):
    """Be the process of ``domain``: the VMs ``vms``, a scan every ``every_s``, a look at reads every ``reads_s``."""

    domain: str
    vms: tuple[str, ...]
    every_s: float = 10.0
    reads_s: float = 1.0
    watch: Watch = Watch()
    large: Thresholds = Thresholds()


class Tell(msgspec.Struct, frozen=True, tag="tell"):
    """Tell how things are."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Un-share everything, and end."""


class MemberTold(msgspec.Struct, frozen=True):
    """A guest of a domain; bytes. ``read_much``: pages un-shared for how they were read, by pattern."""

    vm: str
    shared: int
    copied: int
    zeros: int
    read_much: dict[str, int]
    failure: str | None


class Told(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.sharing.v1"):
    """A domain; bytes, and bytes/s of one processor.

    ``shareable``: what sharing could still free, at the last scan; ``saved``: what it frees now: pages that are mapped
    from the pool and not copied, less the pool itself; pages of zeros that were given up come on top (``zeros``).
    ``inside``: what breaking large pages would free on top; ``broken`` of them are, for want of memory, which takes so
    many ``tlb_entries`` more to cover.

    Of the ``backend`` ``ksm`` less is known: ``pool`` and ``unstable`` are the host's, ``saved`` is what is left
    of ``shared`` when the host's pool is subtracted; None is not known, and no ``process`` of ours is 0.
    """

    domain: str
    process: int
    scans: int
    scanned: int
    scan_rate: float | None
    shareable: int | None
    unstable: int
    pool: int
    shared: int
    saved: int
    zeros: int
    inside: int
    broken: int
    tlb_entries: int
    members: list[MemberTold]
    backend: Literal["overlay", "ksm"] = "overlay"


class EngineMember:
    """A guest of this host as a member of a domain: read through its file, told through its engine.

    :raise NotFoundError: its memory is not managed, or it has ended.
    """

    def __init__(self, record: VmRecord, domain: str) -> None:
        layout = Layout.load(record.memory_directory / LAYOUT)
        if layout is None:
            raise NotFoundError(f"the memory of {record.name} is not managed")
        self.name = record.name
        self._layout = layout
        self._domain = domain
        self.control = record.memory_directory / CONTROL
        self._guest = layout.guest()
        self.pages = self._guest.pages
        # The engine's own arrays: mapped, never written here.
        self._residency = Residency(self.pages, record.memory_directory)

    @property
    def where(self) -> NDArray[np.uint8]:
        """Live."""
        return self._residency.where

    @property
    def locator(self) -> NDArray[np.uint64]:
        """Live."""
        return self._residency.locator

    def regions(self) -> NDArray[np.int64]:
        return self._guest.memory.table()

    def populated(self) -> PageSet:
        return self._guest.memory.populated()

    @property
    def managed(self) -> bool:
        """Whether this guest still runs, and is managed: another may have its name by now."""
        return self.control.exists() and self._layout.alive

    def order(self, order: EngineOrder) -> Looked:
        """Tell its engine something."""
        return ask(self.control, order)

    def _pages(self, order: EngineOrder) -> int:
        return self.order(order).moved // PAGE_SIZE

    def share(self, spans: Spans) -> int:
        return sum(self._pages(Share(self._domain, [tuple(row) for row in part.tolist()])) for part in _parts(spans))

    def drop_zeros(self, runs: Runs) -> int:
        return sum(self._pages(DropZeros([tuple(row) for row in part.tolist()])) for part in _parts(runs))

    def large(self) -> PageSet:
        return large_mappings(self._guest)

    def rebuild(self, blocks: list[int]) -> int:
        return self._pages(Rebuild(blocks))

    def tidy(self) -> int:
        return self._pages(Tidy())

    def close(self) -> None:
        """Let go of the guest's files."""
        self._guest.close()


def _parts(rows: Piece) -> list[Piece]:
    return [rows[at : at + _SPANS] for at in range(0, len(rows), _SPANS)]


class Running:
    """The process's work.

    :raise RefusedError: ``sharing``: another process has the domain.
    :raise NotFoundError: one of its VMs is not managed.
    """

    def __init__(self, work: Sharing, registry: Registry) -> None:
        self._work = work
        self._directory = domain_directory(registry.root, work.domain)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            self._lock = _only_one(self._directory, work.domain)
            undo.callback(os.close, self._lock)
            self._pool_path = pool_path(registry.root, work.domain)
            if wanted_of(self._directory) is None:
                # Nobody has shared anything yet: what cannot begin leaves nothing.
                undo.callback(_remove, self._directory, self._pool_path)
            self._pool = Pool(self._pool_path, np.random.default_rng())
            undo.callback(self._pool.close)
            self._members: list[EngineMember] = []
            for vm in work.vms:
                self._members.append(EngineMember(registry.get(vm), work.domain))
                undo.callback(self._members[-1].close)
            secret = np.frombuffer(os.urandom(SECRET), dtype=np.uint8).copy()
            self._domain = Domain(self._members, self._pool, secret)
            # Whoever writes the pool's slots must know which are in use before the first is taken.
            self._pool.retain(self._domain.slots())
            self._clients = Clients(self._directory / CONTROL)
            undo.callback(self._clients.close)
            _keep(work, self._directory)
            undo.pop_all()
        self._found = Found(0, 0, 0, 0, 0)
        self._scans = 0
        self._inside = 0.0
        self._zeros = dict.fromkeys(work.vms, 0)
        self._failures: dict[str, str] = {}

    def serve(self) -> None:
        """Scan, share and answer until told to stop."""
        with contextlib.closing(self._clients):
            self._serve()

    def _serve(self) -> None:
        scan_due = reads_due = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= scan_due:
                self._part()
                if not self._members:
                    self._end()
                    return
                self._round()
                scan_due = time.monotonic() + self._work.every_s
            if now >= reads_due:
                self._look_at_reads()
                reads_due = time.monotonic() + self._work.reads_s
            patience = max(0.0, min(scan_due, reads_due) - time.monotonic())
            for client in self._clients.speaking(patience):
                going_on = self._attend(client)
                if going_on is None:
                    self._clients.drop(client)
                elif not going_on:
                    return

    def _attend(self, client: Connection) -> bool | None:
        try:
            order = msgspec.json.decode(client.recv_bytes(), type=Tell | Stop)
        except (EOFError, OSError, msgspec.DecodeError):
            return None
        stopping = isinstance(order, Stop)
        try:
            answer: Told | Failed = self._stop() if stopping else self._told()
        except OutboardError as error:
            answer, stopping = Failed(why=str(error), exit_code=error.exit_code), False
        if stopping:
            self._end()
        with contextlib.suppress(OSError):
            client.send_bytes(msgspec.json.encode(answer))
        return not stopping

    def _end(self) -> None:
        self._clients.turn_away()
        _remove(self._directory, self._pool_path)
        os.close(self._lock)

    def _part(self) -> None:
        """Part with guests that have ended, or were released: their engines have left nothing."""
        for member in [one for one in self._members if not one.managed]:
            log.info("a VM shares no more", vm=member.name, domain=self._work.domain)
            self._members.remove(member)
            self._domain.leave(member.name)
            member.close()

    def _round(self) -> None:
        before = {member.name: int(np.count_nonzero(member.where == Where.ZERO)) for member in self._members}
        self._mind_large_pages()
        done = self._domain.round()
        self._inside = self._domain.inside().pages
        for member in self._members:
            self._zeros[member.name] += max(0, int(np.count_nonzero(member.where == Where.ZERO)) - before[member.name])
        self._found, self._failures = done.found, done.failures
        self._scans += 1
        for vm, why in done.failures.items():
            log.warning("sharing", vm=vm, why=why)

    def _mind_large_pages(self) -> None:
        """Break large pages where memory is short, rebuild them where it is plenty, and else leave them."""
        thresholds, pressure = self._work.large, _pressure()
        reclaim = wanted(pressure, thresholds)
        if reclaim:
            chosen = self._domain.reclaim(reclaim, thresholds.least)
            log.info("large pages are broken", domain=self._work.domain, blocks=chosen, available=pressure.available)
        elif plenty(pressure, thresholds) and any(self._domain.broken):
            rebuilt, failures = self._domain.rebuild()
            self._failures.update(failures)
            log.info("large pages are rebuilt", domain=self._work.domain, blocks=rebuilt)

    def _each(self, order: EngineOrder) -> None:
        for member in self._members:
            try:
                member.order(order)
            except OutboardError as error:
                self._failures[member.name] = str(error)

    def _look_at_reads(self) -> None:
        self._each(ReadRound(self._work.watch))

    def _stop(self) -> Told:
        """Un-share everything; the domain goes on if a guest could not be."""
        for member in self._members:
            try:
                member.order(Unshare())
            except UnreachableError:
                if member.managed:
                    raise
        self._pool.retain(self._domain.slots())
        return self._told()

    def _told(self) -> Told:
        told = [self._member(member) for member in self._members]
        cost = tlb_cost(sum(len(blocks) for blocks in self._domain.broken), 0.0, 0.0)
        pool, shared = self._pool.used() * PAGE_SIZE, sum(one.shared for one in told)
        return Told(
            domain=self._work.domain,
            process=os.getpid(),
            scans=self._scans,
            scanned=self._found.scanned * PAGE_SIZE,
            scan_rate=self._domain.speed(),
            shareable=self._found.shareable * PAGE_SIZE,
            unstable=self._found.unstable * PAGE_SIZE,
            pool=pool,
            shared=shared,
            saved=max(0, shared - sum(one.copied for one in told) - pool),
            zeros=sum(one.zeros for one in told),
            inside=round(self._inside * PAGE_SIZE),
            broken=cost.broken,
            tlb_entries=cost.entries,
            members=told,
        )

    def _member(self, member: EngineMember) -> MemberTold:
        failure = self._failures.get(member.name)
        try:
            now = member.order(Look())
        except OutboardError as error:
            return MemberTold(member.name, 0, 0, 0, {}, failure or str(error))
        zeros = min(now.zero, self._zeros[member.name] * PAGE_SIZE)
        return MemberTold(member.name, now.shared, now.copied, zeros, now.read_much, failure)


def _pressure() -> Pressure:
    stalled = 0.0
    # A kernel without PSI, or that was started with psi=0.
    with contextlib.suppress(KernelError):
        stalled = psi.stalled_share()
    return Pressure(proc.meminfo()["MemAvailable"], stalled)


def _remove(directory: Path, pool: Path) -> None:
    # First what says that the domain is to share: whoever ends here is not begun again.
    (directory / WANTED).unlink(missing_ok=True)
    pool.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _keep(work: Sharing, directory: Path) -> None:
    fresh = directory / f"{WANTED}.new"
    fresh.write_bytes(msgspec.json.encode(work))
    fresh.rename(directory / WANTED)


def wanted_of(directory: Path) -> Sharing | None:
    """What the domain whose directory this is was started with; None if it is not to share any more."""
    try:
        return msgspec.json.decode((directory / WANTED).read_bytes(), type=Sharing)
    except FileNotFoundError:
        return None


def forget(root: Path, domain: str) -> None:
    """Remove what a domain has left whose VMs have all ended, and whose process died.

    :raise RefusedError: ``sharing``: a process has it.
    """
    directory = domain_directory(root, domain)
    # It may have gone meanwhile, told to stop.
    with contextlib.suppress(FileNotFoundError):
        lock = _only_one(directory, domain)
        _remove(directory, pool_path(root, domain))
        os.close(lock)


def _only_one(directory: Path, domain: str) -> int:
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise RefusedError(
            "sharing", f"the domain {domain} shares already; outboard sharing status {domain} tells how far it is"
        ) from error
    return fd


def ask_domain(directory: Path, order: Tell | Stop) -> Told:
    """Give an order to the process of the domain whose directory this is.

    :raise NotFoundError: nothing is shared there.
    :raise UnreachableError: its process has ended, or ended meanwhile.
    :raise OutboardError: it could not do that.
    """
    if not (directory / WANTED).exists():
        raise NotFoundError(f"no sharing domain {directory.name} is active; outboard sharing start begins it")
    reached = sockets.connect(directory / CONTROL, _CONNECT_S, "the process of this sharing domain")
    reached.settimeout(None)
    with Connection(reached.detach()) as connection:
        try:
            connection.send_bytes(msgspec.json.encode(order))
            answer: Told | Failed = msgspec.json.decode(connection.recv_bytes(), type=Told | Failed)
        except (EOFError, OSError) as error:
            raise UnreachableError(
                f"the process of the sharing domain {directory.name} ended before it answered; the agent starts another"
            ) from error
    if isinstance(answer, Failed):
        raise error_of(answer.exit_code, answer.why)
    return answer


def active(root: Path) -> list[Path]:
    """The directories of the domains that are to share."""
    return sorted(one.parent for one in (root / "sharing").glob(f"*/{WANTED}"))


def run(work: Sharing, registry: Registry, ready: Callable[[], None]) -> None:
    """Be the process of a domain; ``ready`` is called once it takes orders."""
    running = Running(work, registry)
    ready()
    running.serve()
