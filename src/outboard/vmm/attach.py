"""attach: clamp on to a running QEMU, also one that Outboard did not start, and see that its memory can be managed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

from outboard.errors import KernelError, PeerError, RefusedError, UsageError
from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.vmm import memory_map
from outboard.vmm.guest import Guest, Region, VCpu
from outboard.vmm.memory_map import RamRange
from outboard.vmm.monitor import Monitor, MonitorError

_UCRED = struct.Struct("3i")
_HVA = re.compile(r"is 0x([0-9a-f]+)")
_UFFD_FLAGS = frozenset({"um", "uw", "ui"})
"""VmFlags of smaps: registered with a userfaultfd for missing pages, write-protection, minor faults."""


def attach(
    *, qmp: Path | None = None, pid: int | None = None, name: str | None = None, agent_path: Path | None = None
) -> Guest:
    """Attach to a QEMU by its QMP socket, or by its process.

    :param name: what to call it; QEMU's own -name when not given.
    :param agent_path: the guest agent's socket; found on QEMU's command line when not given.
    :raise UsageError: neither or both of ``qmp`` and ``pid``.
    :raise RefusedError: the VM cannot be managed; its ``reason`` is ``anonymous-memory``, ``not-shared``, ``no-ram``,
        ``vfio``, ``vhost-user``, ``confidential``, ``uffd-taken``, ``no-privilege``, ``not-qemu`` or ``no-monitor``.
    :raise UnreachableError: its monitor does not answer.
    """
    if (qmp is None) == (pid is None):
        raise UsageError("attach takes either a QMP socket or a pid")
    if qmp is None:
        qmp = find_monitor(pid or 0)
    monitor = Monitor.connect(qmp)
    try:
        process = pid or _peer_pid(qmp)
        name = name or monitor.execute("query-name").get("name") or f"qemu-{process}"
        _check_devices(name, process, monitor)
        regions = _regions(name, process, monitor)
        vcpus = tuple(VCpu(cpu["cpu-index"], cpu["thread-id"]) for cpu in monitor.execute("query-cpus-fast"))
        return Guest(name, process, regions, vcpus, monitor, agent_path or find_agent(process))
    except KernelError as error:
        monitor.close()
        if isinstance(error, PermissionError) or error.errno in (1, 13):
            raise RefusedError(
                "no-privilege",
                f"{name or qmp}: {error}; managing a VM's memory takes CAP_SYS_PTRACE and CAP_SYS_ADMIN (or "
                "CAP_CHECKPOINT_RESTORE): run as root",
            ) from error
        raise
    except BaseException:
        monitor.close()
        raise


def _peer_pid(path: Path) -> int:
    """Who listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(os.fspath(path))
        return int(_UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])


def _options(arguments: list[str], *names: str) -> list[str]:
    return [value for option, value in itertools.pairwise(arguments) if option.lstrip("-") in names]


def _property(option: str, key: str) -> str | None:
    for part in option.split(","):
        name, _, value = part.partition("=")
        if name == key:
            return value
    return None


def find_monitor(pid: int) -> Path:
    """The path of a QMP unix socket on the command line of QEMU process ``pid``.

    :raise RefusedError: ``not-qemu``: there is no such process, or it is another program; ``no-monitor``.
    """
    try:
        arguments = proc.command_line(pid)
    except KernelError as error:
        raise RefusedError("not-qemu", f"there is no process {pid} to attach to: {error}") from error
    if "qemu" not in Path(arguments[0]).name:
        raise RefusedError("not-qemu", f"process {pid} is {arguments[0]}, not a QEMU")
    control = {
        chardev
        for option in _options(arguments, "mon")
        if "control" in option and (chardev := _property(option, "chardev"))
    }
    paths = [
        option.removeprefix("unix:").partition(",")[0] for option in _options(arguments, "qmp") if "unix:" in option
    ]
    for option in _options(arguments, "chardev"):
        if _property(option, "id") in control and (path := _property(option, "path")):
            paths.append(path)
    if not paths:
        raise RefusedError(
            "no-monitor",
            f"QEMU process {pid} has no QMP monitor on a unix socket; start it with -qmp unix:PATH,server=on",
        )
    # QEMU may see another root or working directory than we do.
    return (
        Path(f"/proc/{pid}/root") / paths[0].lstrip("/")
        if paths[0].startswith("/")
        else Path(f"/proc/{pid}/cwd") / paths[0]
    )


def find_agent(pid: int) -> Path | None:
    """The socket of the chardev that serves the port org.qemu.guest_agent.0, if the command line has one."""
    try:
        arguments = proc.command_line(pid)
    except KernelError:
        return None
    wanted = {
        _property(option, "chardev")
        for option in _options(arguments, "device")
        if _property(option, "name") == "org.qemu.guest_agent.0"
    }
    for option in _options(arguments, "chardev"):
        if _property(option, "id") in wanted and (path := _property(option, "path")):
            return Path(path)
    return None


def _check_devices(name: str, pid: int, monitor: Monitor) -> None:
    links = proc.descriptors(pid).values()
    with contextlib.suppress(MonitorError):
        if monitor.execute("qom-get", path="/machine", property="confidential-guest-support"):
            raise RefusedError(
                "confidential", f"{name} is a confidential VM: its memory is encrypted, and cannot be moved by the host"
            )
    refuse_pinned(name, list(links))
    refuse_vhost_user(name, monitor.human("info network"), _device_types(monitor))


def refuse_pinned(name: str, links: list[str]) -> None:
    """Refuse a VM with a passed-through device.

    :param links: what QEMU's descriptors refer to.
    :raise RefusedError: ``vfio``.
    """
    if any(link.startswith("/dev/vfio/") or "kvm-vfio" in link or "[iommufd]" in link for link in links):
        raise RefusedError(
            "vfio",
            f"{name} has a passed-through (VFIO) device: the device writes to pinned memory past any page fault; "
            "unplug it first",
        )


def refuse_vhost_user(name: str, network: str, device_types: list[str]) -> None:
    """Refuse a VM whose memory another process maps.

    :param network: the text of ``info network``; :param device_types: of all devices.
    :raise RefusedError: ``vhost-user``.
    """
    if "vhost-user" in network or any("vhost-user" in kind or "vhost-vdpa" in kind for kind in device_types):
        raise RefusedError(
            "vhost-user",
            f"{name} has a vhost-user device: another process maps its memory, and what it writes cannot be traced; "
            "use a device that QEMU serves itself",
        )


def _device_types(monitor: Monitor) -> list[str]:
    kinds: list[str] = []
    for place in ("/machine/peripheral", "/machine/peripheral-anon"):
        entries: list[dict[str, Any]] = monitor.execute("qom-list", path=place)
        kinds += [str(entry["type"]) for entry in entries]
    return kinds


def _regions(name: str, pid: int, monitor: Monitor) -> tuple[Region, ...]:
    visible = memory_map.ram_ranges(monitor.human("info mtree -f"))
    # Firmware, video memory and option ROMs are RAM blocks too; they travel with the devices' state.
    sizes = memory_map.block_sizes(monitor.human("info ramblock"))
    backends = {str(memdev.get("id")) for memdev in monitor.execute("query-memdev")}
    managed = {block: size for block, size in sizes.items() if block.removeprefix("/objects/") in backends}
    if not managed:
        # QEMU makes the default RAM without a backend.
        managed = {block: size for block, size in sizes.items() if block.endswith(".ram") and size >= 1 << 20}
    ranges = memory_map.widen(visible, managed)
    maps = proc.maps(pid)

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

    regions = memory_map.regions_of(name, ranges, hva_of, maps)
    made: list[Region] = []
    for region in regions:
        fields = proc.smaps(pid, region.mapping.start)
        flags = set(fields.get("VmFlags", "").split())
        if flags & _UFFD_FLAGS:
            raise RefusedError(
                "uffd-taken",
                f"{name}: its memory is registered with another userfaultfd (QEMU's post-copy or background snapshot, "
                "or another manager); let that end first",
            )
        size = int(fields["KernelPageSize"].split()[0]) * 1024
        made.append(region if size == PAGE_SIZE else dataclasses.replace(region, page_size=size))
    return tuple(made)
