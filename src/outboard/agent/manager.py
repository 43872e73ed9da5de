"""The engine of a managed guest: one process that keeps its pages in memory and in stores while the guest runs.

What it knows lies in a directory of the VM's, on tmpfs, so that a successor goes on where it stopped:

============  ===========================================================================
lock          held (flock(2)) by the engine, whose pid is in it
layout.json   the guest as it was attached: a guest that waits for a page answers no QMP
where         the journal of :class:`~outboard.pages.residency.Residency`, with ``locator``
pool          pages that went to memory; ``pool.slots``
control.sock  where it takes orders: JSON, each with a length before it
============  ===========================================================================

A successor of the same guest either finds nobody (the engine died) or asks it to hand over: the old one answers the
faults that it has read, lets go, and ends; those that come between wait a few milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from outboard.agent.orders import Evict, Failed, Fetch, HandOver, Looked, Order, Release, ask
from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux import pidfd, proc
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.heat import Heat
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.trace.idle import IdleTrace
from outboard.vmm.guest import Guest, Region, VCpu

CONTROL = "control.sock"
_HAND_OVER_S = 10.0
_HALF_LIFE_S = 300.0
"""Of what earlier orders have seen the guest touch."""
_LOOK_S = 1.0
"""How often to look whether faults are still served."""
_STORES = {"pool": Where.POOL, "file": Where.FILE}


class Layout(msgspec.Struct, frozen=True):
    """A guest as it was attached; with ``start_time`` the pid is a process for good."""

    name: str
    pid: int
    start_time: int
    regions: tuple[Region, ...]
    vcpus: tuple[VCpu, ...]


class Manager:
    """Keeps the guest whose directory is ``directory``.

    :param attach: attaches to the guest, the first time.
    :param swap: the swap file.
    :param successor: ask an engine that has the guest to hand it over.
    :raise RefusedError: ``managed``: another engine has it; else as :class:`~outboard.pager.pager.Pager`.
    :raise NotFoundError, UnreachableError, KernelError: the guest cannot be attached to.

    Synchronization: one thread; faults are served by another.
    """

    def __init__(self, directory: Path, attach: Callable[[], Guest], swap: Path, *, successor: bool = False) -> None:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._directory = directory
        with contextlib.ExitStack() as undo:
            self._lock = _lock(directory, successor=successor)
            undo.callback(os.close, self._lock)
            self._layout = _layout(directory, attach)
            layout = self._layout
            self._guest = Guest(layout.name, layout.pid, layout.regions, layout.vcpus)
            undo.callback(self._guest.close)
            swap.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            pages = self._guest.pages
            self._stores = {
                Where.POOL: FileStore(directory / "pool", pages),
                Where.FILE: FileStore(swap, pages),
            }
            self._heat = Heat(pages, _HALF_LIFE_S, time.monotonic())
            self._process = pidfd.open(layout.pid)
            undo.callback(os.close, self._process)
            self._pager = Pager(self._guest, Residency(pages, directory), self._stores)
            undo.pop_all()
        self._swap = swap
        self._listener = _listen(directory / CONTROL)

    def serve(self) -> None:
        """Serve until the guest has been released or handed over, or has ended.

        :raise OutboardError: faults are no longer served; a successor goes on.
        """
        clients: dict[int, Connection] = {}
        poll = select.poll()
        for fd in (self._listener.fileno(), self._process):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll(_LOOK_S * 1000):
                if fd == self._process:
                    self._let_go()
                    self._forget()
                    os.close(self._lock)
                    return
                if fd == self._listener.fileno():
                    client = Connection(self._listener.accept()[0].detach())
                    clients[client.fileno()] = client
                    poll.register(client.fileno(), select.POLLIN)
                    continue
                going_on = self._attend(clients[fd])
                if going_on is None:
                    poll.unregister(fd)
                    clients.pop(fd).close()
                elif not going_on:
                    return
            if isinstance(self._pager.failure, KernelError):
                raise self._pager.failure

    def _attend(self, client: Connection) -> bool | None:
        """Carry out one order; whether to go on, None when the client has gone."""
        try:
            order = msgspec.json.decode(client.recv_bytes(), type=Order)
        except (EOFError, OSError, msgspec.DecodeError):
            return None
        try:
            answer: Looked | Failed = self._looked(self._carry_out(order))
        except OutboardError as error:
            answer = Failed(why=str(error), exit_code=error.exit_code)
        ended = isinstance(answer, Looked) and isinstance(order, Release | HandOver)
        if ended:
            # Whoever is answered may begin at once.
            self._let_go()
            if isinstance(order, Release):
                self._forget()
            os.close(self._lock)
        with contextlib.suppress(OSError):
            client.send_bytes(msgspec.json.encode(answer))
        return not ended

    def _carry_out(self, order: Order) -> int:
        match order:
            case Evict():
                return self._evict(order)
            case Fetch():
                return self._pager.fetch(PageSet.full(self._guest.pages))
            case Release():
                came = self._pager.fetch(PageSet.full(self._guest.pages))
                self._pager.release()
                return came
        return 0

    def _evict(self, order: Evict) -> int:
        cold = self._pager.residency.pages_at(Where.RESIDENT) & self._guest.memory.populated()
        if order.idle:
            trace = IdleTrace(self._guest)
            time.sleep(order.idle)
            idle = trace.idle()
            self._heat.touch((~idle).numbers(), time.monotonic())
            cold &= idle
        numbers = cold.numbers()
        if order.most is not None:
            # What was not touched this time may have been before.
            coldest = np.argsort(self._heat.frequencies(time.monotonic())[numbers], kind="stable")
            numbers = np.sort(numbers[coldest[: order.most // PAGE_SIZE]])
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
            moved=moved * PAGE_SIZE,
            faults=latencies.count,
            fault_p50_us=latencies.percentile_us(0.5),
            fault_p99_us=latencies.percentile_us(0.99),
            failure=None if self._pager.failure is None else str(self._pager.failure),
        )

    def _let_go(self) -> None:
        self._pager.close()
        self._guest.close()
        self._listener.close()
        for store in self._stores.values():
            store.close()

    def _forget(self) -> None:
        """The guest is nobody's any more: leave nothing behind."""
        for path in self._swap.parent.glob(self._swap.name + "*"):
            path.unlink()
        shutil.rmtree(self._directory, ignore_errors=True)


def _lock(directory: Path, *, successor: bool) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _HAND_OVER_S
        asked = not successor
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever released the guest has removed the directory, and with it the lock that we have open.
                directory.mkdir(mode=0o750, parents=True, exist_ok=True)
                if (directory / "lock").exists() and os.path.samestat(os.fstat(fd), (directory / "lock").stat()):
                    break
                os.close(fd)
                fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                continue
            if not asked:
                ask(directory / CONTROL, HandOver(), _HAND_OVER_S)
                asked = True
            elif not successor or time.monotonic() > deadline:
                owner = os.pread(fd, 20, 0).decode()
                raise RefusedError(
                    "managed", f"engine {owner} has this guest ({directory}); outboard release lets it go"
                )
            time.sleep(0.001)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _layout(directory: Path, attach: Callable[[], Guest]) -> Layout:
    path = directory / "layout.json"
    try:
        layout = msgspec.json.decode(path.read_bytes(), type=Layout)
        if proc.start_time(layout.pid) == layout.start_time:
            return layout
    except (FileNotFoundError, KernelError):
        pass
    # Another process's pages, if anybody's.
    for old in directory.iterdir():
        if old.name != "lock":
            old.unlink()
    with attach() as guest:
        layout = Layout(guest.name, guest.pid, proc.start_time(guest.pid), guest.regions, guest.vcpus)
    fresh = directory / "layout.new"
    fresh.write_bytes(msgspec.json.encode(layout))
    fresh.rename(path)
    return layout


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    # By the directory's descriptor: the path may be longer than an address.
    place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{place}/{path.name}")
        path.chmod(0o660)
        listener.listen()
    finally:
        os.close(place)
    return listener
