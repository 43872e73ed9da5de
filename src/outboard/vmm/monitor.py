"""QMP, QEMU's machine protocol, for code that is not asynchronous.

qemu.qmp does the protocol. Its client lives in an event loop of ours that runs only while a call is made, so a Monitor
costs no thread; what QEMU says in between waits in the socket.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from outboard.errors import OutboardError, UnreachableError
from outboard.vmm import sockets

_KEPT = 1000
T = TypeVar("T")


class MonitorError(OutboardError):
    """QEMU refused a command."""


class _Client(QMPClient):
    """The library's client with an inbox: a bounded one, that loses nothing when a wait for it is cut short."""

    def __init__(self) -> None:
        super().__init__("outboard")
        self.logger.disabled = True
        self.inbox: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.arrived = asyncio.Event()

    # The library's own hooks spell out every message for its log, which costs more than the command does.

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    async def _on_message(self, msg: Message) -> None:
        if "event" not in msg:
            await super()._on_message(msg)
            return
        self.inbox.append({"data": {}, **msg})
        self.arrived.set()


class Monitor:
    """A connection to one QEMU's monitor; ``peer_pid`` is the process that listens there.

    A command that was not answered in time may still be carried out; the Monitor remains usable, and its late answer is
    dropped. Once QEMU has ended, every call raises UnreachableError, at once. Of events that nobody asks for the latest
    thousand are kept.

    Synchronization: one thread; a forked process leaves its parent's alone.
    """

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop, client: _Client, peer_pid: int) -> None:
        self._path = path
        self._loop = loop
        self._client = client
        self.peer_pid = peer_pid

    @classmethod
    def connect(cls, path: Path, timeout: float = 5.0) -> Monitor:
        """Connect to the monitor at the unix socket ``path``.

        :raise UnreachableError: nobody answers: no such socket, a QEMU that has ended, or one whose monitor is taken by
            somebody else (it has one client at a time).
        """
        connection = sockets.connect(path, timeout, "the monitor")
        pid = sockets.peer_pid(connection)
        connection.setblocking(False)
        loop = asyncio.new_event_loop()
        try:
            client = _Client()
            loop.run_until_complete(asyncio.wait_for(client.connect(connection), timeout))
        except (TimeoutError, OSError, EOFError, QMPError) as error:
            connection.close()
            loop.close()
            why = (
                f"no greeting in {timeout:g} s: somebody else is connected to it (a monitor has one client at a time; "
                "close the other, or give QEMU a second -qmp), or QEMU is stopped"
                if isinstance(error, TimeoutError)
                else _words(error)
            )
            raise UnreachableError(f"no answer from the monitor at {path}: {why}") from error
        return cls(path, loop, client, pid)

    def _do(self, work: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        if self._loop.is_closed():
            work.close()
            raise UnreachableError(f"{what}: the connection to QEMU at {self._path} has been closed")
        task = self._loop.create_task(work)
        timer = self._loop.call_later(timeout, task.cancel)
        try:
            return self._loop.run_until_complete(task)
        except asyncio.CancelledError as error:
            raise UnreachableError(f"{what}: QEMU at {self._path} did not answer within {timeout:g} s") from error
        except ExecuteError as error:
            raise MonitorError(f"{what}: QEMU says: {error}") from error
        except (EOFError, OSError, QMPError) as error:
            raise UnreachableError(f"{what}: QEMU at {self._path} is gone: {_words(error)}") from error
        finally:
            timer.cancel()
            if not task.done():
                # Interrupted from outside, by a signal's exception.
                task.cancel()
                with suppress(asyncio.CancelledError):
                    self._loop.run_until_complete(task)

    def execute(self, command: str, timeout: float = 30.0, **arguments: object) -> Any:
        """Execute a command and return its answer.

        :raise MonitorError: QEMU refused it; the message holds QEMU's words.
        :raise UnreachableError: no answer, because QEMU has ended or within ``timeout`` seconds.
        """
        return self._command(command, arguments, timeout)

    def _command(self, command: str, arguments: dict[str, object], timeout: float) -> Any:
        return self._do(self._client.execute(command, arguments or None), timeout, command)

    def human(self, line: str, timeout: float = 30.0) -> str:
        """Execute a line of the human monitor, for what QMP does not offer."""
        return str(self._command("human-monitor-command", {"command-line": line}, timeout))

    def wait_event(self, names: Set[str], timeout: float) -> dict[str, Any]:
        """The next event that is one of ``names``; others are kept for later calls, in their order.

        :return: as QMP has it: ``event``, ``data``, and ``timestamp`` with seconds and microseconds.
        :raise UnreachableError: none came within ``timeout`` seconds, or QEMU has ended.
        """
        return self._do(self._next(names), timeout, f"wait for {' or '.join(sorted(names))}")

    async def _next(self, names: Set[str]) -> dict[str, Any]:
        client = self._client
        while True:
            client.arrived.clear()
            for index, event in enumerate(client.inbox):
                if event["event"] in names:
                    del client.inbox[index]
                    return event
            if client.runstate is not Runstate.RUNNING:
                raise EOFError("the connection was closed")
            # The client wakes nobody who waits for an event when QEMU ends; its state does.
            waits = [asyncio.create_task(client.arrived.wait()), asyncio.create_task(_change(client))]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

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


async def _change(client: QMPClient) -> bool:
    await client.runstate_changed()
    return True


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
