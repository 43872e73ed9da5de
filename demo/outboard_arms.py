"""Outboard's ways, by its own commands only: an agent on each host, and ``outboard migrate``.

After the command the destination's agent starts the QEMU that takes the VM in; its start is part of these arms' times.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .arms import OUTBOARD, Hosts, wait_for
from .figures import Outcome
from .hosts import LINK_ADDRESSES, Namespace, TestbedError
from .monitors import VmMonitor
from .vms import Job, Vm

_PATIENCE_S = 120.0
"""After the resume, or after the cancel: then the command is taken to hang."""


@dataclass
class OutboardArm:
    """One of Outboard's ways.

    :param method: the option of ``outboard migrate``. :param options: others.
    """

    name: str
    limit_s: float
    method: str
    options: Sequence[str] = ()
    _hosts: Hosts | None = None
    _agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def prepare(self, hosts: Hosts) -> None:
        """Make the cluster's certificates and start both agents."""
        self._hosts = hosts
        bed = hosts.bed
        cluster = bed.directory / "cluster"
        options = [f"--host={role}={address}" for role, address in LINK_ADDRESSES.items()]
        hosts.outboard(bed.a, "pki", "init", str(cluster), *options)
        for host, peer in ((bed.a, "b"), (bed.b, "a")):
            configuration = Path(hosts.environment(host)["OUTBOARD_CONFIG_DIR"])
            shutil.copytree(cluster / host.role, configuration / "pki")
            (configuration / "agent.toml").write_text(
                f'name = "{host.role}"\nlisten = "{LINK_ADDRESSES[host.role]}"\n\n'
                f'[hosts]\n{peer} = "{LINK_ADDRESSES[peer]}"\n'
            )
            with (bed.directory / f"agent-{host.role}.log").open("wb") as log:
                agent = host.popen(
                    [str(OUTBOARD), "agent"], stdout=log, stderr=log, environment=hosts.environment(host)
                )
            self._agents.append(agent)
        for host in (bed.a, bed.b):
            self._wait_for_agent(host)

    def _wait_for_agent(self, host: Namespace) -> None:
        assert self._hosts is not None
        deadline = time.monotonic() + 20
        path = self._hosts.runtime(host) / "agent.sock"
        while not path.exists():
            if time.monotonic() > deadline or any(agent.poll() is not None for agent in self._agents):
                log = (self._hosts.bed.directory / f"agent-{host.role}.log").read_text()
                raise TestbedError(f"the agent of host {host.role} did not come up:\n{log}")
            time.sleep(0.05)

    def expect(self, vm: Vm) -> None:
        """Outboard needs nothing but its agents."""

    def migrate(self, vm: Vm, resumed: Callable[[VmMonitor], None]) -> Outcome:
        """See :class:`demo.arms.Arm`."""
        assert self._hosts is not None
        bed = self._hosts.bed
        log = bed.directory / "migrate.ndjson"
        source = self._hosts.monitor(bed.a, vm)
        began = time.monotonic()
        until = began + self.limit_s
        with log.open("wb") as output:
            process = bed.a.popen(
                [str(OUTBOARD), "migrate", vm.name, "b", f"--{self.method}", *self.options, "-o", "ndjson", "--wait"],
                stdout=output,
                stderr=output,
                environment=self._hosts.environment(bed.a),
            )
        try:
            try:
                destination = self._hosts.monitor(bed.b, vm)
            except TestbedError as error:
                said = log.read_text().strip()
                raise TestbedError(f"{self.name}: no VM came up on host B; outboard migrate says: {said}") from error
            resumed(destination)
            resume = wait_for(destination, "RESUME", until, lambda: process.poll() is not None)
            if resume is None and process.poll() is None:
                self._hosts.outboard(bed.a, "cancel", vm.name)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired as error:
                raise TestbedError(f"{self.name}: outboard migrate hangs; so far: {log.read_text()[-2000:]}") from error
            stop = source.event("STOP", 0.01)
            destination.close()
        finally:
            source.close()
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        outcome = self._outcome(log, None if stop is None else stop.at, resume)
        outcome.lead_s = outcome.command_at - began
        return outcome

    def _outcome(self, log: Path, stop: float | None, resume: float | None) -> Outcome:
        summary = last_line(log)
        command_at = summary["started"] - (time.time() - time.monotonic())
        outcome = Outcome(
            command_at=command_at,
            converged=summary["state"] == "completed",
            remote_faults=summary["remote_faults"],
            fault_p50_us=summary["fault_p50_us"],
            fault_p99_us=summary["fault_p99_us"],
            summary=summary,
        )
        if outcome.converged:
            if stop is None or resume is None:
                raise TestbedError(f"{self.name}: QEMU's monitors told of no STOP or no RESUME: {summary}")
            outcome.total_s = summary["total_s"]
            outcome.time_to_stop_s = stop - command_at
            outcome.time_to_resume_s = resume - command_at
        elif summary["state"] == "cancelled":
            outcome.note = f"did not converge in {self.limit_s:.0f} s and was cancelled"
            outcome.given_up_s = summary["total_s"]
        else:
            raise TestbedError(f"{self.name} failed: {summary['error']}\n{self._agents_logs()}")
        return outcome

    def _agents_logs(self) -> str:
        assert self._hosts is not None
        return "\n".join(path.read_text() for path in sorted(self._hosts.bed.directory.glob("agent-*.log")))

    def check(self, vm: Vm, job: Job) -> list[str]:
        """Migrate back to host A, paused at the switch-over until every page's digest was compared."""
        assert self._hosts is not None
        if self.method == "pre-copy":
            job.stop()  # on a core of its own it writes faster than the link carries
        bed = self._hosts.bed
        command = ("migrate", vm.name, "a", f"--{self.method}", "--verify", "-o", "ndjson", "--wait")
        try:
            output = self._hosts.outboard(bed.b, *command)
        except TestbedError as error:
            return [f"{error}\n{self._agents_logs()}"]
        verified = msgspec.json.decode(output.splitlines()[-1])["verified"]
        return [] if verified is True else ["digests at the switch-over differ"]

    def close(self) -> None:
        """End the agents as an operator would."""
        for agent in self._agents:
            agent.terminate()
        for agent in self._agents:
            try:
                agent.wait(10)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
        self._agents.clear()


def last_line(log: Path) -> dict[str, Any]:
    """The summary that ends what ``outboard migrate -o ndjson`` prints.

    :raise TestbedError: it printed something else.
    """
    lines = log.read_text().splitlines()
    for line in reversed(lines):
        if line.startswith("{"):
            summary: dict[str, Any] = msgspec.json.decode(line)
            if summary.get("schema") == "outboard.migration.summary.v1":
                return summary
    raise TestbedError("outboard migrate ended without a summary; it said:\n" + "\n".join(lines[-20:]))


def outboard_arms(limit_s: float) -> list[OutboardArm]:
    """All of them, in the report's order."""
    return [
        OutboardArm("outboard-enlightened", limit_s, "enlightened"),
        OutboardArm("outboard-post-copy", limit_s, "post-copy"),
        OutboardArm("outboard-pre-copy", limit_s, "pre-copy"),
    ]
