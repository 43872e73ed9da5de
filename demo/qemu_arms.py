"""QEMU's own migration: the same VM, link and workload, by QEMU's monitor at both ends.

The destination's QEMU is started beforehand and waits, as a management tool would have it; what Outboard's agent does
after the command is therefore not in these arms' times. Nothing limits the rate but the link. The downtime limit
stays at QEMU's default of 300 ms. Post-copy is switched to at once. RAM goes over plain TCP, unless
the arm says otherwise.

Source: QEMU's docs/devel/migration.rst, qapi/migration.json (7.2).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from outboard.vmm.launch import launch
from outboard.vmm.registry import Registry
from outboard.vmm.spec import read_spec

from .arms import Hosts
from .figures import Outcome
from .hosts import LINK_ADDRESSES, TestbedError
from .monitors import VmMonitor
from .vms import Job, Vm

PORT = 4444
UNLIMITED = 10**12
"""Bytes/s, far above any link here."""


@dataclass
class QemuArm:
    """One of QEMU's ways.

    :param capabilities: set at both ends.
    :param parameters: set at both ends.
    :param tls: whether RAM goes over TLS, with a key that both ends have.
    :param post_copy: whether to switch to post-copy as soon as the migration has begun.
    """

    name: str
    limit_s: float
    capabilities: Sequence[str] = ()
    parameters: dict[str, object] = field(default_factory=dict)
    post_copy: bool = False
    tls: bool = False
    _hosts: Hosts | None = None
    _source: VmMonitor | None = None
    _destination: VmMonitor | None = None

    def prepare(self, hosts: Hosts) -> None:
        """QEMU needs nothing."""
        self._hosts = hosts

    def expect(self, vm: Vm) -> None:
        """Start the destination's QEMU and let it listen."""
        assert self._hosts is not None
        a, b = self._hosts.bed.a, self._hosts.bed.b
        spec = read_spec(self._hosts.runtime(a) / "vms" / vm.name / "spec.toml")
        registry = Registry(self._hosts.runtime(b))
        b.call(lambda: launch(spec, registry, incoming=True))
        self._source, self._destination = self._hosts.monitor(a, vm), self._hosts.monitor(b, vm)
        for monitor, blocktime in ((self._source, []), (self._destination, ["postcopy-blocktime"])):
            names = ["events", *self.capabilities, *(blocktime if self.post_copy else [])]
            capabilities = [{"capability": name, "state": True} for name in names]
            monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})
            parameters: dict[str, object] = {"max-bandwidth": UNLIMITED, **self.parameters}
            if self.tls:
                endpoint = "client" if monitor is self._source else "server"
                parameters["tls-creds"] = self._credentials(monitor, endpoint)
            monitor.execute("migrate-set-parameters", parameters)
        self._destination.execute("migrate-incoming", {"uri": f"tcp:{LINK_ADDRESSES['b']}:{PORT}"})

    def _credentials(self, monitor: VmMonitor, endpoint: str) -> str:
        """Give QEMU the key; the name of that object."""
        assert self._hosts is not None
        directory = self._hosts.bed.directory / "psk"
        if not directory.exists():
            directory.mkdir(mode=0o700)
            (directory / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")
        credentials = {"qom-type": "tls-creds-psk", "id": "tls", "dir": str(directory), "endpoint": endpoint}
        if endpoint == "client":
            credentials["username"] = "qemu"
        monitor.execute("object-add", credentials)
        return "tls"

    def migrate(self, vm: Vm, resumed: Callable[[VmMonitor], None]) -> Outcome:  # noqa: ARG002 (there is but one)
        """See :class:`demo.arms.Arm`."""
        assert self._source is not None
        assert self._destination is not None
        source, destination = self._source, self._destination
        resumed(destination)
        outcome = Outcome(command_at=time.monotonic(), converged=False)
        until = outcome.command_at + self.limit_s
        source.execute("migrate", {"uri": f"tcp:{LINK_ADDRESSES['b']}:{PORT}"})
        if self.post_copy:
            source.execute("migrate-start-postcopy")
        status, left_at = _end(source, until)
        if status == "completed":
            status, arrived_at = _end(destination, until)
            outcome.total_s = max(left_at, arrived_at) - outcome.command_at
            outcome.converged = True
        elif status == "active":
            outcome.note = f"did not converge in {self.limit_s:.0f} s and was cancelled"
            outcome.given_up_s = time.monotonic() - outcome.command_at
            source.execute("migrate_cancel")
            _end(source, time.monotonic() + 10)
        if status not in ("completed", "active"):
            raise TestbedError(f"{self.name}: QEMU ended its migration as {status!r}: {_figures(source)}")
        if outcome.converged:
            stop, resume = source.event("STOP", 5), destination.event("RESUME", 5)
            outcome.time_to_stop_s = None if stop is None else stop.at - outcome.command_at
            outcome.time_to_resume_s = None if resume is None else resume.at - outcome.command_at
        outcome.summary = _figures(source)
        if self.post_copy:
            outcome.remote_faults = outcome.summary["ram"]["postcopy-requests"]
            blocked = _figures(destination).get("postcopy-blocktime")
            if blocked is not None:
                outcome.note = f"the vCPU waited {blocked} ms in all for remote pages (postcopy-blocktime)"
        return outcome

    def check(self, vm: Vm, job: Job) -> None:
        """QEMU compares nothing."""

    def close(self) -> None:
        """The VMs are the testbed's to end."""
        for monitor in (self._source, self._destination):
            if monitor is not None:
                monitor.close()
        self._source = self._destination = None


def _end(monitor: VmMonitor, until_s: float) -> tuple[str, float]:
    """The status that a migration ended in at one end and when, or the last one when the time is up."""
    status, at = "none", 0.0
    while status not in ("completed", "failed", "cancelled"):
        seen = monitor.event("MIGRATION", max(until_s - time.monotonic(), 0.001))
        if seen is None:
            return "active", time.monotonic()
        status, at = seen.data["status"], seen.at
    return status, at


def _figures(monitor: VmMonitor) -> dict[str, Any]:
    """query-migrate, asked again as long as it lacks figures: right after the end it may."""
    deadline = time.monotonic() + 5
    while True:
        answer: dict[str, Any] = monitor.execute("query-migrate")
        if "ram" in answer or "postcopy-blocktime" in answer or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


def qemu_arms(limit_s: float, throttled_limit_s: float) -> list[QemuArm]:
    """All of them, in the report's order.

    :param throttled_limit_s: auto-converge is slow on purpose and gets more time.
    """
    preempt = ("postcopy-ram", "postcopy-preempt")
    return [
        QemuArm("qemu-pre-copy", limit_s),
        QemuArm("qemu-auto-converge", throttled_limit_s, ("auto-converge",)),
        QemuArm("qemu-post-copy", throttled_limit_s, ("postcopy-ram",), post_copy=True),
        QemuArm("qemu-post-copy-preempt", throttled_limit_s, preempt, post_copy=True),
    ]


def multifd_arm(limit_s: float, channels: int = 2, *, tls: bool = False) -> QemuArm:
    """Pre-copy over several connections: QEMU's fastest where the link is not the limit."""
    name = f"qemu-multifd-{channels}{'-tls' if tls else ''}"
    return QemuArm(name, limit_s, ("multifd",), {"multifd-channels": channels}, tls=tls)
