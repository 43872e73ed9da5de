"""The two VMs, as a person with the product's own commands has them, and the job inside the one that moves.

Both are started by ``outboard run`` on host A; the file that describes them is all that an arm is told about its VMs.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from guest.build import COMMAND_LINE

from .hosts import Namespace, Testbed, TestbedError

MEMCACHED_PORT = 11211
JOB_PORT = 7000
BOOT_S = 60.0
CONTENDED_CORE = 0
"""Both VMs' vCPUs on host A share it."""
OTHER_CORE = 1
"""The evicted VM's vCPU has it on host B."""


@dataclass(frozen=True)
class Vm:
    """A VM of the demo, by its name and its place in the guests' network."""

    name: str
    address: str
    mac: str

    def spec(self, kernel: Path, initrd: Path, memory: str, page_size: str) -> str:
        """What ``outboard run`` is given, TOML."""
        return (
            f'name = "{self.name}"\nmemory = "{memory}"\nvcpus = 1\npage_size = "{page_size}"\n\n'
            f'[boot]\nkernel = "{kernel}"\ninitrd = "{initrd}"\nappend = "{COMMAND_LINE} ip={self.address}"\n\n'
            f'[[networks]]\ntap = "tap-{self.name}"\nbridge = "guests"\nmac = "{self.mac}"\n'
        )


EVICTED = Vm("web", "10.77.0.11", "52:54:00:77:00:0b")
NEIGHBOUR = Vm("cache", "10.77.0.12", "52:54:00:77:00:0c")
VMS = (EVICTED, NEIGHBOUR)


@dataclass(frozen=True)
class Progress:
    """The job's own account.

    :ivar at: CLOCK_MONOTONIC on the hosts.
    :ivar longest_gap_ms: between two 20 ms ticks of the guest's clock since the last reset.
    """

    at: float
    writes: int
    longest_gap_ms: float


class Job:
    """The job in a guest that writes pages, over its control connection.

    The connection is made once and lives through the migration, like the client's.
    """

    def __init__(self, bed: Testbed, vm: Vm) -> None:
        self._vm = vm
        self._socket = bed.client.call(lambda: socket.create_connection((vm.address, JOB_PORT), timeout=120))
        self._answers = self._socket.makefile("rb")

    def _ask(self, line: str) -> str:
        """Send a command; returns the answer.

        :raise TestbedError: the job went away or refused.
        """
        self._socket.sendall(line.encode() + b"\n")
        answer = self._answers.readline().decode(errors="replace").strip()
        if not answer or answer.startswith("error"):
            raise TestbedError(f"the job in {self._vm.name} answered {line!r} with {answer!r}")
        return answer

    def churn(self, mib: int) -> None:
        """Fill memory with random bytes and free it."""
        self._ask(f"churn {mib}")

    def start(self, mib: int, writes_per_s: int) -> None:
        """Fill the working set and begin to write pages of it at random."""
        self._ask(f"start {mib} {writes_per_s}")

    def progress(self) -> Progress:
        """What it has done so far."""
        words = dict(word.split("=") for word in self._ask("stats").split())
        return Progress(time.monotonic(), int(words["writes"]), float(words["gap_ms"]))

    def reset(self) -> Progress:
        """Forget the longest gap; returns what was done so far."""
        progress = self.progress()
        self._ask("reset")
        return progress

    def stop(self) -> None:
        """Stop writing; what was written can still be checked."""
        self._ask("stop")

    def check(self) -> list[str]:
        """Check every page of the working set, the job going on meanwhile; the failure in words, or nothing."""
        answer = self._ask("verify")
        return [] if answer.startswith("ok") else [f"the guest's own check: {answer}"]

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._answers.close()
        self._socket.close()


def wait_for_port(namespace: Namespace, address: str, port: int, timeout_s: float) -> None:
    """Return once a connection is accepted.

    :raise TestbedError: nobody answers.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            namespace.call(lambda: socket.create_connection((address, port), timeout=1)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TestbedError(f"{address}:{port} did not answer in {timeout_s:.0f} s: {error}") from error
            time.sleep(0.05)
