"""attach: clamp on to a running QEMU, also one that Outboard did not start, and see that its memory can be managed."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from outboard.errors import KernelError, OutboardError, PeerError, RefusedError, UnreachableError, UsageError
from outboard.linux import proc
from outboard.vmm import memory_map, qemu_process, refusals
from outboard.vmm.clamp import registrations
from outboard.vmm.guest import QemuGuest, Region, VCpu
from outboard.vmm.memory_map import RamRange
from outboard.vmm.monitor import Monitor, MonitorError

_HVA = re.compile(r"is 0x([0-9a-f]+)")


def attach(
    *,
    qmp: Path | None = None,
    pid: int | None = None,
    name: str | None = None,
    agent_path: Path | None = None,
    managed: bool = False,
) -> QemuGuest:
    """Attach to a QEMU by its QMP socket, or by its process.

    A userfaultfd is seen if QEMU holds it. One that only another manager holds is met when the memory is registered.

    :param name: what to call it; QEMU's own -name when not given.
    :param agent_path: the guest agent's socket; found on QEMU's command line when not given.
    :param managed: also take one whose memory is registered already, which can be looked at and not managed.
    :raise UsageError: neither or both of ``qmp`` and ``pid``.
    :raise RefusedError: the VM cannot be managed; its ``reason`` is ``anonymous-memory``, ``not-shared``, ``no-ram``,
        ``vfio``, ``vhost-user``, ``ivshmem``, ``confidential``, ``uffd-taken``, ``no-privilege``, ``not-qemu`` or
        ``no-monitor``.
    :raise UnreachableError: its monitor does not answer.
    """
    if (qmp is None) == (pid is None):
        raise UsageError("attach takes either a QMP socket or a pid")
    monitor = None
    try:
        monitor = Monitor.connect(qmp) if qmp is not None else _monitor_of(pid or 0)
        return _attach(monitor, name, agent_path, managed=managed)
    except BaseException as error:
        if monitor is not None:
            monitor.close()
        if isinstance(error, KernelError) and error.errno in (errno.EPERM, errno.EACCES):
            raise RefusedError(
                "no-privilege",
                f"{name or qmp or f'process {pid}'}: {error}; managing a VM's memory takes CAP_SYS_PTRACE and "
                "CAP_SYS_ADMIN (or CAP_CHECKPOINT_RESTORE): run as root",
            ) from error
        raise


def _monitor_of(pid: int) -> Monitor:
    """The first monitor on the command line of process ``pid`` that has time for us."""
    qemu_process.check(pid)
    paths = qemu_process.monitors(pid)
    if not paths:
        raise RefusedError(
            "no-monitor",
            f"QEMU process {pid} has no QMP monitor on a unix socket; start it with -qmp unix:PATH,server=on,wait=off",
        )
    failure: OutboardError | None = None
    for path in paths:
        try:
            monitor = Monitor.connect(path, timeout=2 if len(paths) > 1 else 5)
        except UnreachableError as error:
            failure = failure or error
            continue
        if monitor.peer_pid == pid:
            return monitor
        failure = RefusedError("no-monitor", f"at {path}, process {monitor.peer_pid} answers instead of QEMU {pid}")
        monitor.close()
    assert failure is not None
    raise failure


def _attach(monitor: Monitor, name: str | None, agent_path: Path | None, *, managed: bool) -> QemuGuest:
    pid = monitor.peer_pid
    qemu_process.check(pid)
    name = name or monitor.execute("query-name").get("name") or f"qemu-{pid}"
    links = list(proc.descriptors(pid).values())
    _check(name, links, monitor)
    regions = _regions(name, pid, monitor)
    # Looked at only where there is something to be found.
    if not managed and any("userfaultfd" in link for link in links) and any(registrations(pid, regions)):
        raise RefusedError(
            "uffd-taken",
            f"{name}: its memory is registered with another userfaultfd (QEMU's post-copy or background snapshot, "
            "or another manager); let that end first",
        )
    return QemuGuest(name, pid, regions, _vcpus(name, pid, monitor), monitor, agent_path or qemu_process.agent(pid))


def _check(name: str, links: list[str], monitor: Monitor) -> None:
    types = [
        str(entry["type"])
        for place in ("/machine/peripheral", "/machine/peripheral-anon", "/objects")
        for entry in monitor.execute("qom-list", path=place)
    ]
    try:
        guard = monitor.execute("qom-get", path="/machine", property="confidential-guest-support")
    except MonitorError:
        # A machine that cannot be confidential has no such property.
        guard = ""
    refusals.refuse_confidential(name, guard)
    refusals.refuse_pinned(name, links, types)
    refusals.refuse_shared_with_others(name, monitor.human("info network"), types)
    refusals.refuse_own_faults(name, monitor.execute("query-migrate-capabilities"))


def _vcpus(name: str, pid: int, monitor: Monitor) -> tuple[VCpu, ...]:
    """The vCPUs' threads, which will be throttled: they must be QEMU's."""
    vcpus = tuple(VCpu(cpu["cpu-index"], cpu["thread-id"]) for cpu in monitor.execute("query-cpus-fast"))
    threads = {thread.tid for thread in proc.threads(pid)}
    for vcpu in vcpus:
        if vcpu.tid not in threads:
            raise PeerError(
                f"{name}: QEMU says that vCPU {vcpu.index} is thread {vcpu.tid}, which process {pid} does not have; "
                "a QEMU in a PID namespace of its own cannot be attached to from outside it"
            )
    return vcpus


def _regions(name: str, pid: int, monitor: Monitor) -> tuple[Region, ...]:
    visible = memory_map.ram_ranges(monitor.human("info mtree -f"))
    # Firmware, video memory and option ROMs are RAM blocks too; they travel with the devices' state.
    blocks = memory_map.blocks(monitor.human("info ramblock"))
    backends = {str(memdev.get("id")) for memdev in monitor.execute("query-memdev")}
    managed = {block: size for block, size in blocks.items() if block.removeprefix("/objects/") in backends}
    if not managed:
        # QEMU makes the default RAM without a backend.
        managed = {block: size for block, size in blocks.items() if block.endswith(".ram") and size.size >= 1 << 20}
    ranges = memory_map.widen(visible, managed)

    def hva_of(one: RamRange) -> int:
        # Ask at an address that the guest sees as this RAM now, and count back from there.
        shown = next(
            range_
            for range_ in visible
            if range_.name == one.name and range_.gpa - range_.offset == one.gpa - one.offset
        )
        answer = monitor.human(f"gpa2hva {shown.gpa:#x}")
        match = _HVA.search(answer)
        if match is None:
            raise PeerError(f"{name}: `gpa2hva {shown.gpa:#x}` answers {answer.strip()!r}")
        return int(match[1], 16) - shown.gpa + one.gpa

    return memory_map.regions_of(name, ranges, hva_of, managed, proc.maps(pid))
