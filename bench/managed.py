"""What chaos plays with: a process and a guest whose memory is managed, and that verify it."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from pathlib import Path

import msgspec

from demo.hosts import ROOT
from guest.build import build
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Look, ask
from outboard.agent.swapping import ReservedSwap
from outboard.errors import OutboardError
from tests.support.cluster import Cluster, Vm
from tests.support.target import Target

from .engines import engine

MIB, GUEST_MIB = 64, 256
"""Of a process and a guest."""
_IMPORTED = [
    "demo.hosts",
    "guest.build",
    "tests.support.cluster",
    "tests.support.target",
    "rich.console",
    "bench.claims",
]
"""By the program, whose main module each engine runs again, as multiprocessing does: nobody is to wait for that."""
_READY_S = 120.0


class ManagedProcess:
    """A process with three writers; each :meth:`next` is another engine for it.

    :param directory: for what lies in memory, made if it is not there. :param swap: a reservation's.
    """

    def __init__(self, directory: Path, swap: ReservedSwap | None = None) -> None:
        directory.mkdir(exist_ok=True)
        self.name = directory.name
        self._directory = directory
        self._swap = b"" if swap is None else msgspec.json.encode(swap)
        self._target = Target("memfd", MIB)
        self._engines = multiprocessing.get_context("forkserver")
        self._engines.set_forkserver_preload(["bench.engines", *_IMPORTED])
        self.control = directory / "memory" / CONTROL
        self._target.ask("g")

    def next(self) -> int:
        """Start an engine, and wait until it serves."""
        ours, theirs = self._engines.Pipe()
        arguments = (str(self._directory), self._target.pid, theirs, self._swap)
        process = self._engines.Process(target=engine, args=arguments)
        process.start()
        theirs.close()
        ours.recv_bytes()
        ours.close()
        threading.Thread(target=process.join, daemon=True).start()
        assert process.pid is not None
        return process.pid

    def wrong(self) -> int:
        """How many words the writers do not find as they left them."""
        return int(self._target.ask("s").split()[1])

    def close(self) -> None:
        """End the process; its engine ends with it."""
        self._target.__exit__(None, None, None)


class ManagedGuest:
    """A Debian guest that writes, on a host whose agent starts the engines."""

    def __init__(self, cluster: Cluster) -> None:
        self.name = "guest"
        self._vm = Vm(cluster, build(ROOT / ".build/guest"), self.name, mebibytes=GUEST_MIB)
        self._vm.write()
        done = cluster.a.outboard("evict", self.name, "--idle", "0.2")
        if done.returncode:
            raise OutboardError(done.stderr)
        self.control = self._vm.record("a").memory_directory / CONTROL
        self._dead = 0

    def next(self) -> int:
        """Wait until the agent has started another engine, and that one serves.

        :raise OutboardError: it has not.
        """
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OutboardError):
                found = ask(self.control, Look(), 5.0).engine
                if found != self._dead:
                    self._dead = found
                    return found
            time.sleep(0.002)
        raise OutboardError("the agent has started no other engine")

    def wrong(self) -> int:
        """How many pages the guest does not find as it left them."""
        said = self._vm.tell("a", "verify")
        return 0 if said.startswith("ok") else 1

    def close(self) -> None:
        """The cluster ends it."""
