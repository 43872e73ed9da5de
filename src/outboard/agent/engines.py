"""How the agent starts engines: each forked from a server process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from outboard.agent.engine import run_engine
from outboard.agent.tasks import Managing, Refused, Task
from outboard.errors import UnreachableError, error_of
from outboard.vmm.registry import Registry


class Engines:
    """Starts engines of this host.

    :param identity: the directory of its TLS identity.

    Synchronization: any thread.
    """

    def __init__(self, registry: Registry, identity: Path) -> None:
        self._registry, self._identity = registry, identity
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["outboard.agent.engine", "click"])

    def warm(self) -> None:
        """Start the server that engines are forked from: the first of them need not wait for it then."""
        first = self._context.Process(target=_nothing)
        first.start()
        first.join()

    def start(self, task: Task) -> Connection:
        """Start one, and return the pipe that it listens and reports on."""
        ours, theirs = self._context.Pipe()
        engine = self._context.Process(
            target=run_engine,
            args=(msgspec.json.encode(task), theirs, os.fspath(self._registry.root), os.fspath(self._identity)),
        )
        engine.start()
        theirs.close()
        # Reaped when it ends; the agent does not wait for it.
        threading.Thread(target=engine.join, daemon=True).start()
        return ours


def first_answer(pipe: Connection, patience_s: float, who: str) -> int:
    """Wait until an engine that was just started serves; its pid. The pipe is closed.

    :param who: it, in words.
    :raise UnreachableError: it died, or did not answer in ``patience_s`` seconds.
    :raise OutboardError: it could not begin, and why.
    """
    try:
        if not pipe.poll(patience_s):
            raise UnreachableError(f"{who} was not ready in {patience_s:g} s")
        answer: Managing | Refused = msgspec.json.decode(pipe.recv_bytes(), type=Managing | Refused)
    except (EOFError, OSError) as error:
        raise UnreachableError(f"{who} died at once; the agent's log may say why") from error
    finally:
        pipe.close()
    if isinstance(answer, Refused):
        raise error_of(answer.exit_code, answer.why)
    return answer.engine


def _nothing() -> None:
    """The first engine's work."""
