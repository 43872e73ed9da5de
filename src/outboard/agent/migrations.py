"""The migrations that began on this host and are remembered by its agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection

import msgspec

from outboard.errors import NotFoundError, RefusedError
from outboard.migrate.desk import Cancel, Limit, Order, Switch
from outboard.migrate.report import Progress, Summary, is_progress
from outboard.migrate.states import TRANSITIONS, Event, State

_KEPT = 2000
"""Reports of one migration that a late listener is still told, the newest."""
_decode_progress: msgspec.json.Decoder[Progress] = msgspec.json.Decoder(Progress)


class Running:
    """One migration: its engine's pipe, what the engine has reported, and whoever listens.

    :param succeed: called when the engine has died: the pipe of another that goes on, if there is one.

    Synchronization: the agent's event loop alone.
    """

    def __init__(self, migration: str, vm: str, pipe: Connection, succeed: Callable[[], Connection | None]) -> None:
        self.migration = migration
        self.vm = vm
        self._pipe = pipe
        self._succeed = succeed
        self._said_why = False
        self._reports: list[bytes] = []
        self._dropped = 0
        self._ended = False
        self._news = asyncio.Event()
        self.summary: Summary | None = None
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._hear)

    @property
    def ended(self) -> bool:
        """Whether the engine is gone."""
        return self._ended

    def _hear(self) -> None:
        try:
            report = self._pipe.recv_bytes()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._pipe.close()
            another = None if self._said_why else self._succeed()
            if another is None:
                self._ended = True
            else:
                self._pipe = another
                asyncio.get_running_loop().add_reader(another.fileno(), self._hear)
        else:
            self._said_why = not is_progress(report)
            if len(self._reports) - self._dropped >= _KEPT:
                self._reports[self._dropped] = b""
                self._dropped += 1
            self._reports.append(report)
        self._news.set()

    @property
    def state(self) -> State | None:
        """What it said last of its state; None: nothing yet."""
        for report in reversed(self._reports):
            if is_progress(report):
                return _decode_progress.decode(report).state
        return None

    def order(self, order: Order) -> None:
        """Pass an order to the engine; one that has ended takes none."""
        if not self._ended:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(msgspec.json.encode(order))

    async def reports(self) -> AsyncIterator[bytes]:
        """Each report so far, and those to come until the engine has ended."""
        at = self._dropped
        while True:
            while at < len(self._reports):
                yield self._reports[at]
                at += 1
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()


class Migrations:
    """All that the agent remembers.

    Synchronization: the agent's event loop alone.
    """

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}

    def add(self, migration: str, vm: str, pipe: Connection, succeed: Callable[[], Connection | None]) -> Running:
        """Remember a migration that begins; ``succeed`` as in :class:`Running`."""
        running = self._running[migration] = Running(migration, vm, pipe, succeed)
        return running

    def find(self, name: str) -> Running:
        """A migration by its id, or the latest one of the VM of that name.

        :raise NotFoundError: there is neither.
        """
        if name in self._running:
            return self._running[name]
        for running in reversed(self._running.values()):
            if running.vm == name:
                return running
        raise NotFoundError(f"no migration of {name!r} has begun here since the agent started; see outboard history")

    def active(self) -> list[Running]:
        """Those whose engine still runs."""
        return [running for running in self._running.values() if not running.ended]

    def cancel(self, name: str) -> None:
        """Ask for a stop.

        :raise RefusedError: ``too-late``: the VM has been given away, or the migration is over.
        """
        self._order_in_time(name, Cancel())

    def switch(self, name: str) -> None:
        """Ask for the switch-over now; errors as :meth:`cancel`."""
        self._order_in_time(name, Switch())

    def _order_in_time(self, name: str, order: Order) -> None:
        running = self.find(name)
        if running.ended:
            raise RefusedError("too-late", f"the migration of {running.vm} is over; see outboard history {running.vm}")
        state = running.state
        if state is not None and (state, Event.CANCEL) not in TRANSITIONS:
            raise RefusedError(
                "too-late",
                f"{running.vm} has been given to its destination (the migration is {state.value}), and goes on there",
            )
        running.order(order)

    def limit(self, name: str, limit: Limit) -> None:
        """Change limits."""
        self.find(name).order(limit)
