"""QMP, QEMU's machine protocol, for code that is not asynchronous.

qemu.qmp does the protocol. Its client lives in an event loop of ours that runs only while a call is made, so a Monitor
costs no thread; what QEMU says in between waits in the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate, StateError

from outboard.errors import OutboardError, UnreachableError

_KEPT = 1000
_GONE = (EOFError, ConnectionError, ExecInterruptedError, StateError)
T = TypeVar("T")


class MonitorError(OutboardError):
    """QEMU refused a command."""


class Monitor:
    """A connection to one QEMU's monitor.

    Synchronization: one thread; a forked process leaves its parent's alone.
    """

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop, client: QMPClient) -> None:
        self._path = path
        self._loop = loop
        self._client = client
        self._events: list[dict[str, Any]] = []

    @classmethod
    def connect(cls, path: Path, timeout: float = 5.0) -> Monitor:
        """Connect to the monitor at the unix socket ``path``.

        :raise UnreachableError: nobody answers: no such socket, a QEMU that has ended, or one whose monitor is taken by
            somebody else (it has one client at a time).
        """
        loop = asyncio.new_event_loop()
        client = QMPClient("outboard")
        client.logger.disabled = True
        try:
            loop.run_until_complete(asyncio.wait_for(client.connect(str(path)), timeout))
        except (TimeoutError, ConnectError, OSError, *_GONE) as error:
            loop.close()
            why = "somebody else is connected to it" if isinstance(error, TimeoutError) else _words(error)
            raise UnreachableError(f"no answer from the monitor at {path} in {timeout:g} s: {why}") from error
        return cls(path, loop, client)

    def _do(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, timeout))
        except TimeoutError as error:
            raise UnreachableError(f"{what}: QEMU at {self._path} did not answer within {timeout:g} s") from error
        except ExecuteError as error:
            raise MonitorError(f"{what}: QEMU says: {error}") from error
        except (*_GONE, QMPError) as error:
            raise UnreachableError(f"{what}: QEMU at {self._path} is gone: {_words(error)}") from error

    def execute(self, command: str, timeout: float = 30.0, **arguments: object) -> Any:
        """Execute a command and return its answer.

        :raise MonitorError: QEMU refused it; the message holds QEMU's words.
        :raise UnreachableError: no answer, because QEMU has ended or within ``timeout`` seconds.
        """
        return self._command(command, arguments, timeout)

    def _command(self, command: str, arguments: dict[str, object], timeout: float) -> Any:
        return self._do(self._client.execute(command, arguments or None), timeout, command)

    def human(self, line: str) -> str:
        """Execute a line of the human monitor, for what QMP does not offer."""
        return str(self._command("human-monitor-command", {"command-line": line}, 30.0))

    def wait_event(self, names: Set[str], timeout: float) -> dict[str, Any]:
        """The next event that is one of ``names``; others are kept for later calls, in their order.

        :return: as QMP has it: ``event``, ``data``, and ``timestamp`` with seconds and microseconds.
        :raise UnreachableError: none came within ``timeout`` seconds, or QEMU has ended.
        """
        for index, event in enumerate(self._events):
            if event["event"] in names:
                return self._events.pop(index)
        return self._do(self._next(names), timeout, f"wait for {' or '.join(sorted(names))}")

    async def _next(self, names: Set[str]) -> dict[str, Any]:
        while True:
            event = await self._event_or_end()
            event.setdefault("data", {})
            if event["event"] in names:
                return event
            self._events = [*self._events[-_KEPT:], event]

    async def _event_or_end(self) -> dict[str, Any]:
        """The client does not end a waiting listener when QEMU goes away; its state does say so."""
        waiter = asyncio.ensure_future(self._client.events.get())
        changed = asyncio.ensure_future(self._client.runstate_changed())
        try:
            if self._client.runstate is Runstate.RUNNING or not self._client.events.empty():
                await asyncio.wait({waiter, changed}, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done():
                return dict(waiter.result())
            raise EOFError("the connection was closed")
        finally:
            for task in (waiter, changed):
                task.cancel()
            await asyncio.gather(waiter, changed, return_exceptions=True)

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if self._loop.is_closed():
            return
        with suppress(Exception):  # the client re-raises whatever ended it; it is being thrown away
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 2))
        self._loop.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
