"""One run of one arm, from the boot of both VMs to the figures.

Both VMs boot on host A and share its core. The one that will move has its memory churned and its job started; the
client begins, "before" is recorded, the arm moves the VM, "after" is recorded, and everything is checked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arms import Arm, Hosts
from .figures import AFTER_S, BEFORE_S, SETTLE_S, LinkUse, Run, rates
from .hosts import LINK_BYTES_PER_S, LinkCounter, Testbed
from .load import Load
from .vms import (
    BOOT_S,
    CONTENDED_CORE,
    EVICTED,
    JOB_PORT,
    MEMCACHED_PORT,
    OTHER_CORE,
    VMS,
    Job,
    Vm,
    wait_for_port,
)

WARM_S = 1.5
"""The client's first moments, which count nowhere."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What every arm's VMs do.

    :ivar churn_mib: filled and freed in the VM that moves, before it does.
    :ivar connections: of the client to each VM.
    :ivar contended: whether there is a second VM on the core.
    """

    kernel: Path
    initrd: Path
    memory: str = "1GiB"
    page_size: str = "4KiB"
    writes_per_s: int = 40_000
    working_set_mib: int = 256
    churn_mib: int = 300
    connections: int = 4
    contended: bool = True

    @property
    def vms(self) -> tuple[Vm, ...]:
        """The VMs on host A."""
        return VMS if self.contended else (EVICTED,)


class LinkSampler:
    """Reads the link's counter twenty times a second until it is stopped."""

    def __init__(self, bed: Testbed) -> None:
        self._counter = LinkCounter(bed.a)
        self._stopped = threading.Event()
        self._use = LinkUse(at_s=[], bytes=[])
        self._thread = threading.Thread(target=self._sample, name="link sampler")
        self._thread.start()

    def _sample(self) -> None:
        while True:
            self._use.at_s.append(time.monotonic())
            self._use.bytes.append(self._counter.sent())
            if self._stopped.wait(0.05):
                return

    def stop(self) -> LinkUse:
        """What was read, in order of time; idempotent."""
        self._stopped.set()
        self._thread.join()
        self._counter.close()
        return self._use


def play(arm: Arm, workload: Workload, shape: str, say: Say, *, churned: bool = True) -> Run:
    """Run an arm once, on a testbed of its own.

    :param say: is told what happens, one short line at a time.
    :raise TestbedError: the arm or the testbed failed; "did not converge" is no failure.
    """
    with Testbed(shape) as bed:
        hosts = Hosts(bed)
        try:
            arm.prepare(hosts)
            say("boots both VMs")
            accelerator = _boot(hosts, workload)
            job = Job(bed, EVICTED)
            try:
                job.start(workload.working_set_mib, workload.writes_per_s)
                if churned:
                    job.churn(workload.churn_mib)  # after the start: the working set would be made of freed pages
                arm.expect(EVICTED)
                return _measure(arm, bed, job, workload, say, churned=churned, accelerator=accelerator)
            finally:
                job.close()
        finally:
            arm.close()


def _boot(hosts: Hosts, workload: Workload) -> str:
    """Start both VMs on host A and bring them on one core; returns what accelerates them."""
    bed = hosts.bed
    for vm in workload.vms:
        spec = bed.directory / f"{vm.name}.toml"
        spec.write_text(vm.spec(workload.kernel, workload.initrd, workload.memory, workload.page_size))
        hosts.outboard(bed.a, "run", str(spec))
    for vm in workload.vms:
        wait_for_port(bed.client, vm.address, MEMCACHED_PORT, BOOT_S)
    wait_for_port(bed.client, EVICTED.address, JOB_PORT, BOOT_S)
    for vm in workload.vms:
        monitor = hosts.monitor(bed.a, vm)
        try:
            monitor.pin(CONTENDED_CORE)
            kvm = monitor.execute("query-kvm")["enabled"]
        finally:
            monitor.close()
    return "KVM" if kvm else "TCG"


def _measure(arm: Arm, bed: Testbed, job: Job, workload: Workload, say: Say, *, churned: bool, accelerator: str) -> Run:
    targets = {vm.name: (vm.address, MEMCACHED_PORT) for vm in workload.vms}
    with Load(bed.client, targets, workload.connections) as load:
        sampler = LinkSampler(bed)
        try:
            time.sleep(WARM_S)
            warm = job.progress()
            time.sleep(BEFORE_S)
            begin = job.reset()
            say("moves one of them")
            outcome = arm.migrate(EVICTED, lambda destination: destination.pin(OTHER_CORE))
            end = job.progress()
            if outcome.converged:
                time.sleep(SETTLE_S + AFTER_S)
            outcome.watched_s = time.monotonic() - outcome.command_at
        finally:
            link = sampler.stop()
        say("checks")
        checks = job.check()
        traffic = load.finish()
    checks += traffic.broken + traffic.wrong
    proof = arm.check(EVICTED, job) if outcome.converged else None
    if proof is not None:
        checks += proof + job.check()
    command, over = outcome.command_at, outcome.command_at + outcome.during_s
    capacity = LINK_BYTES_PER_S.get(bed.shape)
    after = over + SETTLE_S
    gap = None if outcome.blackout_ms is None else end.longest_gap_ms + outcome.blackout_ms
    return Run(
        arm=arm.name,
        churned=churned,
        shape=bed.shape,
        accelerator=accelerator,
        outcome=outcome,
        traffic=traffic,
        link=link,
        blackout_ms=outcome.blackout_ms,
        longest_gap_ms=gap,
        bytes=link.between(command, over),
        link_share=None if capacity is None else link.busiest(command, over) / capacity,
        writes_per_s_before=(begin.writes - warm.writes) / (begin.at - warm.at),
        writes_per_s_during=(end.writes - begin.writes) / (end.at - begin.at),
        ops_before=rates(traffic, command - BEFORE_S, command),
        ops_during=rates(traffic, command, over),
        ops_after=rates(traffic, after, after + AFTER_S) if outcome.converged else None,
        ops_lost=None,
        client_wait_ms=traffic.wait_ms(EVICTED.name, command, over + SETTLE_S),
        verified=not checks,
        checks=checks,
    )
