"""Processes of ours that a registry takes for VMs of a host, each with its engine in a thread of this process."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from outboard.agent.holding import CONTROL
from outboard.agent.manager import Manager
from outboard.agent.orders import HandOver, Look, Looked, Release, ask
from outboard.linux import proc
from outboard.vmm.process import attach_process
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import VmSpec
from tests.support.target import Target


class Hosted:
    """A target that ``registry`` knows as the VM ``name``, managed; each page but the first holds its number."""

    def __init__(self, registry: Registry, name: str, mebibytes: int = 4) -> None:
        self.name = name
        self._registry = registry
        self.target = Target(mebibytes=mebibytes)
        with registry.reserve(name) as directory:
            registry.add(
                VmRecord(
                    name=name,
                    pid=self.target.pid,
                    start_time=proc.start_time(self.target.pid),
                    directory=directory,
                    accelerator="tcg",
                    accelerator_reason="",
                    memory_bytes=self.target.size,
                    vcpus=1,
                    guest_agent=False,
                    started=0.0,
                ),
                VmSpec(name=name, memory=f"{mebibytes}MiB").to_toml(),
            )
        self._thread: threading.Thread | None = None

    @property
    def directory(self) -> Path:
        """Where its engine keeps what it knows."""
        return self._registry.get(self.name).memory_directory

    @property
    def control(self) -> Path:
        """Where its engine takes orders."""
        return self.directory / CONTROL

    def manage(self) -> Path:
        """Begin an engine, or go on after one that has gone; where it takes orders."""
        if self._thread is None:
            attach = partial(attach_process, self.target.pid)
            manager = Manager(self.directory, attach, self._registry.root / "swap" / self.name)
            self._thread = threading.Thread(target=manager.serve)
            self._thread.start()
        return self.control

    def leave(self) -> None:
        """End the engine, and leave the guest as it is: as if it had died, for all that others can see."""
        ask(self.control, HandOver())
        self._join()

    def release(self) -> None:
        """Have the guest managed no more."""
        ask(self.control, Release())
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(20)
            assert not self._thread.is_alive()
            self._thread = None

    def look(self) -> Looked:
        """How things are with it."""
        return ask(self.control, Look())

    def total(self) -> int:
        """The sum of the words at the beginning of its pages."""
        return int(self.target.ask("t").split()[1])

    def end(self) -> None:
        """End the target, and with it its engine. Idempotent."""
        self.target.__exit__(None, None, None)
        self._join()
