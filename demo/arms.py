"""What every arm offers, and the hosts' commands that all of them use.

An arm is one way to move the VM, by one product. Before its run it gets a testbed of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .figures import Outcome
from .hosts import NETNS, Namespace, Testbed, TestbedError
from .monitors import VmMonitor
from .vms import Job, Vm

OUTBOARD = Path(sys.executable).with_name("outboard")
_PATIENCE_S = 120.0
"""After which a command that should have ended is taken to hang."""


class Arm(Protocol):
    """One way to move a VM."""

    @property
    def name(self) -> str:
        """As in the issue, the table and the JSON."""
        ...

    @property
    def limit_s(self) -> float:
        """When an arm that has not ended is given up."""
        ...

    def prepare(self, hosts: Hosts) -> None:
        """Whatever its users have running before anybody thinks of a migration."""
        ...

    def expect(self, vm: Vm) -> None:
        """What they do shortly before it: the VM runs on host A."""
        ...

    def migrate(self, vm: Vm, resumed: Callable[[VmMonitor], None]) -> Outcome:
        """Move the VM to host B; returns when the source is no longer needed, or at the limit with the VM at host A.

        :param resumed: to be called with the monitor of the destination's VM as early as there is one.
        """
        ...

    def check(self, vm: Vm, job: Job) -> list[str] | None:
        """Whatever the product can do to prove that it loses nothing, with the VM at host B.

        :param job: at work in the VM.
        :return: the failures in words; None where there is nothing that it can do.
        """
        ...

    def close(self) -> None:
        """End what :meth:`prepare` and :meth:`expect` started; idempotent."""
        ...


class Hosts:
    """The hosts of a testbed as Outboard's commands see them: each with its own configuration, runtime and state."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        for namespace in (bed.a, bed.b):
            for path in self.environment(namespace).values():
                Path(path).mkdir(parents=True)

    def environment(self, host: Namespace) -> dict[str, str]:
        """The variables that point Outboard's commands to this host's directories."""
        base = self.bed.directory / host.role
        return {
            "OUTBOARD_CONFIG_DIR": str(base / "etc"),
            "OUTBOARD_RUNTIME_DIR": str(base / "run"),
            "OUTBOARD_STATE_DIR": str(base / "state"),
        }

    def runtime(self, host: Namespace) -> Path:
        """Where the host keeps its VMs' records and sockets."""
        return Path(self.environment(host)["OUTBOARD_RUNTIME_DIR"])

    def monitor(self, host: Namespace, vm: Vm) -> VmMonitor:
        """The VM's monitor on that host, as soon as it is there."""
        return VmMonitor.connect(self.runtime(host) / "vms" / vm.name / "qmp.sock")

    def outboard(self, host: Namespace, *arguments: str) -> str:
        """Run an ``outboard`` command on a host; returns what it printed.

        :raise TestbedError: it failed.
        """
        command = ["nsenter", f"--net={NETNS / host.name}", str(OUTBOARD), *arguments]
        environment = os.environ | self.environment(host)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=_PATIENCE_S
            )
        except subprocess.TimeoutExpired as error:
            raise TestbedError(f"outboard {' '.join(arguments)} did not end in {_PATIENCE_S:.0f} s") from error
        if done.returncode:
            raise TestbedError(f"outboard {' '.join(arguments)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout


def wait_for(monitor: VmMonitor, event: str, until_s: float, ended: Callable[[], bool]) -> float | None:
    """When an event happened; None when *ended* says that it cannot any more, or the moment *until_s* came."""
    while True:
        over = ended() or time.monotonic() > until_s
        seen = monitor.event(event, 0.01 if over else 0.1)
        if seen is not None:
            return seen.at
        if over:
            return None
