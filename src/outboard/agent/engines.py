"""How the agent starts engines: each forked from a server process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from outboard.agent.engine import Task, run_engine
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


def _nothing() -> None:
    """The first engine's work."""
