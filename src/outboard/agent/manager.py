"""The engine of a managed guest: one process that keeps its pages in memory and in stores while the guest runs.

What it knows lies in a directory of the VM's, on tmpfs, so that a successor goes on where it stopped:

============  ===========================================================================
lock          held (flock(2)) by the engine, whose pid is in it
layout.json   the guest as it was attached: a guest that waits for a page answers no QMP
where         the journal of :class:`~outboard.pages.residency.Residency`, with ``locator``
pool          pages that went to memory; ``pool.slots``
sharing       the name of the domain that it shares pages in, while it does
images.json   which disk image each number means, for pages that a disk holds; ``digests`` of these
swap.json     where swapped pages go; of a reserved swap file ``swap.slots``, ``swap.digests``, ``swap.units``
reclaim.json  what reclaim aims at
control.sock  where it takes orders: JSON, each with a length before it
============  ===========================================================================

A successor of the same guest either finds nobody (the engine died) or asks it to hand over: the old one answers the
faults that it has read, lets go, and ends; those that come between wait a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import structlog

from outboard.agent import restoring
from outboard.agent.clients import Clients
from outboard.agent.holding import CONTROL, Owner, empty, hold, owner
from outboard.agent.orders import (
    DropZeros,
    Evict,
    Failed,
    Fetch,
    HandOver,
    Learn,
    Look,
    Looked,
    Order,
    ReadRound,
    Rebuild,
    Reclaim,
    Recover,
    Release,
    Share,
    Snapped,
    Snapshot,
    Tidy,
    Unshare,
)
from outboard.agent.reclaiming import Reclaimer
from outboard.agent.restoring import Restored
from outboard.agent.sharer import Sharer
from outboard.agent.snapshotting import Snapshotting, Vm, mend
from outboard.agent.swapping import PlainSwap, Swapping
from outboard.errors import DamagedPageError, KernelError, OutboardError, RefusedError
from outboard.linux import pidfd
from outboard.pager.known import Known
from outboard.pager.on_disk import OnDisk
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.heat import Heat
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores import disk
from outboard.stores.file import FileStore
from outboard.stores.images.layers import DiskSpec
from outboard.stores.snapshot import SnapshotStore
from outboard.trace.idle import IdleTrace
from outboard.vmm.guest import Guest
from outboard.vmm.layout import Layout

LAYOUT = "layout.json"
_SWAPPING = "swap.json"
_HALF_LIFE_S = 300.0
"""Of what earlier orders have seen the guest touch."""
_SNAPSHOT_LOOK_S = 0.01
_LOOK_S = 1.0
"""How often to look whether faults are still served."""
_ENDING_S = 1.0
"""Between the end of a process's memory, and its own."""
log = structlog.get_logger()
_STORES = {"pool": Where.POOL, "file": Where.FILE}


@dataclass(frozen=True, slots=True)
class _Pending:
    """An eviction whose pages are being watched until ``due`` (CLOCK_MONOTONIC)."""

    client: Connection
    order: Evict
    trace: IdleTrace
    due: float


class Manager:
    """Keeps the guest whose directory is ``directory``.

    :param attach: attaches to the guest, the first time.
    :param swap: where swapped pages go; of a guest that is managed already, where they have gone so far.
    :param disks: of the guest, and :param indexes: the directory of what they hold, if pages may be left to them.
    :param successor: ask an engine that has the guest to hand it over.
    :param restore: the snapshot that the guest, which has never run, begins with.
    :param vm: what is known of it besides its memory; without it no snapshots are taken.
    :raise RefusedError: ``managed``: another engine has it; else as :class:`~outboard.pager.pager.Pager`.
    :raise NotFoundError, UnreachableError, KernelError: the guest cannot be attached to.

    Synchronization: one thread; faults are served by another.
    """

    def __init__(
        self,
        directory: Path,
        attach: Callable[[], Guest],
        swap: Path | Swapping,
        disks: Sequence[DiskSpec] = (),
        indexes: Path | None = None,
        *,
        successor: bool = False,
        vm: Vm | None = None,
        restore: SnapshotStore | None = None,
    ) -> None:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._directory = directory
        with contextlib.ExitStack() as undo:
            self._lock = hold(directory, successor=successor)
            undo.callback(os.close, self._lock)
            self._swap: Swapping = PlainSwap(os.fspath(swap)) if isinstance(swap, Path) else swap
            layout = Layout.load(directory / LAYOUT)
            if layout is None:
                # Whatever lies here is another guest's, or of the time before a power cut: nobody can want it.
                empty(directory)
                self._swap.remove()
                undo.callback(self._forget)
                (directory / _SWAPPING).write_bytes(msgspec.json.encode(self._swap))
                if restore is not None:
                    restoring.begin(directory, restore.chain[0])
                with attach() as attached:
                    layout = Layout.keep(attached, directory / LAYOUT)
            elif restoring.is_broken(directory):
                raise RefusedError(
                    "restore-broken", f"{layout.name} was not restored to the end, and has never run; restore it again"
                )
            else:
                self._swap = msgspec.json.decode((directory / _SWAPPING).read_bytes(), type=Swapping)
            self._guest = layout.guest()
            undo.callback(self._guest.close)
            self._process = pidfd.open(layout.pid)
            undo.callback(os.close, self._process)
            self._clients = Clients(directory / CONTROL, self._process)
            undo.callback(self._clients.close)
            pages = self._guest.pages
            self._swapped = self._swap.open(pages, directory)
            self._stores: dict[Where, FileStore | SnapshotStore] = {
                Where.POOL: FileStore(directory / "pool", pages),
                Where.FILE: self._swapped,
            }
            self._heat = Heat(pages, _HALF_LIFE_S, time.monotonic())
            residency = Residency(pages, directory)
            self._restored: Restored | None = None
            if (source := restoring.source_of(directory)) is not None:
                store = restore if restore is not None else SnapshotStore(Path(source.directory), source.snapshot)
                self._restored = Restored(directory, source, store)
                undo.callback(self._restored.store.close)
                self._stores[Where.SNAPSHOT] = self._restored.store
                if restore is not None:
                    self._restored.absent(self._guest, residency)
            self._disks = None if indexes is None else OnDisk(disks, indexes, directory, pages)
            if self._disks is not None:
                undo.callback(self._disks.close)
            self._pager = Pager(self._guest, residency, self._stores, on_disk=self._disks)
            undo.callback(self._pager.close)
            self._sharer = Sharer(self._pager, directory, directory.parents[2])
            self._known = Known(self._pager, self._disks)
            self._reclaimer = Reclaimer(self._guest, directory, self._evict_coldest)
            undo.pop_all()
        self._vm = vm
        self._snapshotting: Snapshotting | None = None
        if vm is not None:
            mend(vm, directory)
        self._pending: _Pending | None = None
        self._due = 0.0
        self._failure: Exception | None = None

    def begun(self) -> None:
        """The VM that was restored runs."""
        if self._restored is not None:
            self._restored.runs()

    def bring_all(self) -> None:
        """Bring in everything that the snapshot has.

        :raise DamagedPageError: a page is not what was written.
        """
        self._pager.fetch(self._pager.residency.pages_at(Where.SNAPSHOT))

    def serve(self) -> None:
        """Serve until the guest has been released or handed over, or has ended.

        :raise OutboardError: faults are no longer served; a successor goes on.
        """
        if self._restored is not None:
            self._restored.attend(self._pager)
        with contextlib.closing(self._clients):
            self._serve()

    def _serve(self) -> None:
        while True:
            speaking = self._clients.speaking(self._patience_s())
            if self._clients.called:
                # The guest has ended.
                if self._snapshotting is not None:
                    self._snapshotting.wait()
                self._let_go()
                self._forget()
                os.close(self._lock)
                return
            for client in speaking:
                going_on = self._attend(client)
                if going_on is None:
                    if self._pending is not None and self._pending.client is client:
                        self._pending = None
                    self._clients.drop(client)
                elif not going_on:
                    return
            try:
                if not self._turn():
                    return
            except KernelError:
                # Of a guest that has just ended, which the next look finds.
                if not pidfd.wait(self._process, _ENDING_S):
                    raise

    def _turn(self) -> bool:
        """What is to be done beside orders; whether to go on."""
        if self._pending is not None and time.monotonic() >= self._pending.due:
            pending, self._pending = self._pending, None
            self._answer(pending.client, partial(self._evict_idle, pending))
        if self._snapshotting is None:
            # While an image is taken nobody else moves pages.
            self._leave_disks()
            self._look_after()
            if self._restored is not None:
                self._restored.step()
        elif self._snapshotting.ended and not self._tell_of_snapshot():
            return False
        self._mourn()
        return True

    def _leave_disks(self) -> None:
        """Bring back what lies in images that somebody waits to write to, and let him."""
        if self._disks is None:
            return
        residency = self._pager.residency
        for image in self._disks.disturbed():
            there = (residency.where == Where.DISK) & (disk.images_of(residency.locator) == image)
            came = 0
            with contextlib.suppress(DamagedPageError):
                came = self._pager.fetch(PageSet.from_mask(there))
            log.warning("a disk image below is to be written to", vm=self._guest.name, image=image, brought_back=came)
            self._disks.give_up(image)

    def _look_after(self) -> None:
        """What is to be done now and then: reclaim, and give back room of the swap file's."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _LOOK_S
        try:
            faults = self._pager.statistics().faults
            self._reclaimer.work(now, self._used, faults.file + faults.pool)
            self._swapped.trim()
        except OutboardError as error:
            log.error("reclaim", vm=self._guest.name, why=str(error))

    def _used(self) -> int:
        """Bytes of memory that the guest takes."""
        resident = self._pager.residency.pages_at(Where.RESIDENT)
        return len(resident & self._guest.memory.populated()) * PAGE_SIZE

    def _patience_s(self) -> float:
        if self._snapshotting is not None:
            return _SNAPSHOT_LOOK_S
        if self._restored is not None and not self._restored.done:
            return 0.0
        if self._pending is None:
            return _LOOK_S
        return min(_LOOK_S, max(0.0, self._pending.due - time.monotonic()))

    def _mourn(self) -> None:
        """Say aloud what the serving of faults met with, once.

        :raise KernelError: it has ended.
        """
        failure = self._pager.failure
        if failure is not None and failure is not self._failure:
            self._failure = failure
            log.error("faults", vm=self._guest.name, why=str(failure))
        if isinstance(failure, KernelError):
            raise failure

    def _attend(self, client: Connection) -> bool | None:
        """Carry out one order; whether to go on, None when the client has gone."""
        try:
            order = msgspec.json.decode(client.recv_bytes(), type=Order)
        except (EOFError, OSError, msgspec.DecodeError):
            return None
        if self._snapshotting is not None and not isinstance(order, Look):
            _send(client, Failed(why=f"a snapshot of {self._guest.name} is being taken; wait for it", exit_code=4))
            return True
        if isinstance(order, Snapshot):
            self._begin_snapshot(client, order)
            return True
        if not (isinstance(order, Evict) and order.idle > 0):
            return self._answer(client, partial(self._carry_out, order))
        try:
            self._watch(client, order)
        except OutboardError as error:
            _send(client, Failed(why=str(error), exit_code=error.exit_code))
        return True

    def _begin_snapshot(self, client: Connection, order: Snapshot) -> None:
        if self._vm is None or self._pending is not None:
            why = "is watched for an eviction; wait until that is done" if self._pending else "is no VM of this host's"
            _send(client, Failed(why=f"no snapshot is taken: {self._guest.name} {why}", exit_code=4))
            return
        try:
            # What is shared is in no file of the guest's: the sharing domain may share it again afterwards.
            self._sharer.carry_out(Unshare())
        except OutboardError as error:
            _send(client, Failed(why=str(error), exit_code=error.exit_code))
            return
        self._snapshotting = Snapshotting(self._vm, self._pager, self._disks, self._directory, order, client)

    def _tell_of_snapshot(self) -> bool:
        """Whether to go on."""
        done, self._snapshotting = self._snapshotting, None
        if done is None or done.outcome is None:
            return True
        going_on = True
        if done.order.release:
            try:
                self._carry_out(Release())
                self._let_go()
                os.close(self._lock)
                going_on = False
            except OutboardError as error:
                log.error("still managed after a snapshot", vm=self._guest.name, why=str(error))
        _send(done.client, done.outcome)
        return going_on

    def _answer(self, client: Connection, work: Callable[[], tuple[int, bool]]) -> bool:
        """Do some work and tell the client; whether to go on."""
        ended = False
        try:
            moved, ended = work()
            answer: Looked | Failed = self._looked(moved)
        except OutboardError as error:
            answer = Failed(why=str(error), exit_code=error.exit_code)
        if ended:
            # Whoever is answered may begin at once.
            if self._pending is not None:
                gone = Failed(why=f"{self._guest.name} was let go while it was watched", exit_code=1)
                _send(self._pending.client, gone)
            self._let_go()
            os.close(self._lock)
        _send(client, answer)
        return not ended

    def _carry_out(self, order: Order) -> tuple[int, bool]:
        """Pages moved, and whether that was the end."""
        whole = PageSet.full(self._guest.pages)
        match order:
            case Evict():
                return self._evict(order, whole), False
            case Fetch():
                return self._pager.fetch(whole), False
            case Learn():
                if self._disks is not None:
                    self._disks.await_indexes()
                return self._known.learn(self._guest.memory.populated()), False
            case Recover(page):
                self._known.replace(page)
                return 1, False
            case Reclaim():
                self._reclaimer.steer(order)
                return 0, False
            case Release():
                came = self._pager.fetch(whole)
                self._pager.release()
                self._forget()
                return came, True
            case Share() | Unshare() | DropZeros() | Tidy() | ReadRound() | Rebuild():
                return self._sharer.carry_out(order), False
        return 0, isinstance(order, HandOver)

    def _watch(self, client: Connection, order: Evict) -> None:
        """Begin to look what is idle; other orders are carried out meanwhile."""
        if self._pending is not None:
            raise RefusedError(
                "evicting", f"{self._guest.name} is being watched for another eviction; wait until that is done"
            )
        self._pending = _Pending(client, order, IdleTrace(self._guest), time.monotonic() + order.idle)

    def _evict_idle(self, pending: _Pending) -> tuple[int, bool]:
        idle = pending.trace.idle()
        self._heat.touch((~idle).numbers(), time.monotonic())
        return self._evict(pending.order, idle), False

    def _evict_coldest(self, idle: PageSet, most: int) -> int:
        self._heat.touch((~idle).numbers(), time.monotonic())
        return self._evict(Evict(most=most), idle)

    def _evict(self, order: Evict, among: PageSet) -> int:
        present = self._pager.residency.pages_at(Where.RESIDENT) & self._guest.memory.populated()
        numbers = (present & among).numbers()
        # The guest's own reservation stays in memory.
        most = max(0, len(present) - self._swap.kept // PAGE_SIZE)
        if order.most is not None:
            most = min(most, order.most // PAGE_SIZE)
        if most < numbers.size:
            # What was not touched this time may have been before.
            coldest = np.argsort(self._heat.frequencies(time.monotonic())[numbers], kind="stable")
            numbers = np.sort(numbers[coldest[:most]])
        return self._pager.evict(PageSet.from_numbers(self._guest.pages, numbers), _STORES[order.to])

    def _looked(self, moved: int) -> Looked:
        now = self._pager.statistics()
        latencies = now.faults.latencies
        return Looked(
            vm=self._guest.name,
            engine=os.getpid(),
            memory=now.pages * PAGE_SIZE,
            resident=now.resident * PAGE_SIZE,
            zero=now.zero * PAGE_SIZE,
            pool=now.pool * PAGE_SIZE,
            file=now.file * PAGE_SIZE,
            **self._sharer.looked(),
            disk=now.disk * PAGE_SIZE,
            snapshot=now.snapshot * PAGE_SIZE,
            moved=moved * PAGE_SIZE,
            faults=latencies.count,
            fault_p50_us=latencies.percentile_us(0.5),
            fault_p99_us=latencies.percentile_us(0.99),
            failure=None if self._pager.failure is None else str(self._pager.failure),
            used=self._used(),
            idle=self._reclaimer.idle,
            reclaim=self._reclaimer.status,
        )

    def _let_go(self) -> None:
        self._pager.close()
        self._guest.close()
        self._clients.turn_away()
        for store in self._stores.values():
            store.close()
        if self._disks is not None:
            self._disks.close()
        os.close(self._process)

    def _forget(self) -> None:
        """The guest is nobody's any more: leave nothing behind."""
        whose = owner(self._directory, self._lock)
        # Whoever stops a VM removes its directory, and another of its name may have begun by now.
        if whose is not Owner.ANOTHER:
            self._swap.remove()
        if whose is Owner.WE:
            shutil.rmtree(self._directory, ignore_errors=True)


def _send(client: Connection, answer: Looked | Snapped | Failed) -> None:
    # Whoever asked may have gone.
    with contextlib.suppress(OSError):
        client.send_bytes(msgspec.json.encode(answer))
