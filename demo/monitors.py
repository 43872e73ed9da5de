"""A VM's monitor as the demo uses it: when events happened, and where the vCPU runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outboard.errors import UnreachableError
from outboard.vmm.monitor import Monitor

from .hosts import TestbedError


@dataclass(frozen=True)
class Event:
    """When something happened, on CLOCK_MONOTONIC, and what QEMU says about it."""

    at: float
    data: dict[str, Any]


class VmMonitor:
    """QEMU's monitor for people and tools; a context manager by :meth:`close`.

    Events carry CLOCK_REALTIME; they are given here as CLOCK_MONOTONIC, the clock of the client's record.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._offset = time.time() - time.monotonic()

    @classmethod
    def connect(cls, path: Path, timeout_s: float = 10.0) -> VmMonitor:
        """Connect as soon as the socket is there.

        :raise TestbedError: it does not come.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return cls(Monitor.connect(path, timeout=5.0))
            except UnreachableError as error:
                if time.monotonic() > deadline:
                    raise TestbedError(f"{path} did not answer in {timeout_s:.0f} s: {error}") from error
                time.sleep(0.005)

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command; returns its answer.

        :raise OutboardError: QEMU refused.
        """
        return self._monitor.execute(command, **(arguments or {}))

    def event(self, name: str, timeout_s: float) -> Event | None:
        """The next event of that name which was not asked for before; None when there is none within the time."""
        try:
            event = self._monitor.wait_event({name}, timeout=timeout_s)
        except UnreachableError:
            return None
        stamp = event["timestamp"]
        at = stamp["seconds"] + 1e-6 * stamp["microseconds"] - self._offset
        return Event(at, event["data"])

    def pin(self, core: int) -> None:
        """Keep every vCPU on one core; QEMU's other threads stay where the scheduler puts them."""
        for vcpu in self.execute("query-cpus-fast"):
            os.sched_setaffinity(vcpu["thread-id"], {core})

    def close(self) -> None:
        """Disconnect; idempotent."""
        self._monitor.close()
