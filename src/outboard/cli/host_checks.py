"""The checks of ``outboard doctor`` on the machine: kernel, privileges, memory, QEMU.

Each tries the thing itself where it can; none infers it from a version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from outboard.agent.config import runtime_dir
from outboard.cli.findings import Finding, Verdict
from outboard.cli.output import size_text
from outboard.errors import KernelError, OutboardError
from outboard.linux import cgroup, hugetlb, pagemap, proc, ptrace, transhuge
from outboard.linux.userfaultfd import Features, available_features
from outboard.stores.images.files import ImageFile
from outboard.vmm.accelerator import why_not_kvm
from outboard.vmm.spec import CPU

_CAPABILITIES = {"net_admin": 12, "sys_ptrace": 19, "sys_admin": 21, "sys_nice": 23}
_QEMU = "qemu-system-x86_64"
_QEMU_PACKAGE = "apt-get install qemu-system-x86"
_QEMU_NEEDS = ("x-ignore-shared", "pause-before-switchover")
_SHM = "/dev/shm"  # noqa: S108  # the mount, no file in it
_NEWER_KERNEL = "a kernel from 6.7 on"


def privileges() -> Iterator[Finding]:
    """Which capabilities we have."""
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if "sys_ptrace" in missing or "sys_admin" in missing:
        verdict, follows = Verdict.REFUSED, "another process's memory can neither be traced nor opened"
    elif missing:
        verdict, follows = Verdict.NOTE, "no TAPs without net_admin, faults wait for processors without sys_nice"
    else:
        verdict, follows = Verdict.OK, "processes can be traced, TAPs made, the fault path preferred"
    found = f"without {', '.join(missing)}" if missing else ", ".join(_CAPABILITIES)
    yield Finding("privileges", verdict, found, follows, "run as root" if missing else "")


def userfaultfd() -> Iterator[Finding]:
    """Whether absent pages can be served, and writes traced."""
    try:
        features = available_features()
        scan, soft_dirty = pagemap.has_pagemap_scan(), pagemap.has_soft_dirty()
    except KernelError as error:
        mend = "run as root, on a kernel with CONFIG_USERFAULTFD"
        yield Finding("userfaultfd", Verdict.REFUSED, str(error), "no VM can be traced or taken in", mend)
        return
    missing = [name for name in ("MISSING_SHMEM", "MINOR_SHMEM") if Features[name] not in features]
    if missing:
        found, follows = f"without {', '.join(missing)}", "faults on a guest's shared memory cannot be served"
        yield Finding("userfaultfd", Verdict.REFUSED, found, follows, "a kernel from 5.13 on")
    else:
        yield Finding("userfaultfd", Verdict.OK, "MISSING_SHMEM, MINOR_SHMEM", "VMs can be taken in")
    yield _write_trace(features, scan=scan, soft_dirty=soft_dirty)


def _write_trace(features: Features, *, scan: bool, soft_dirty: bool) -> Finding:
    """Which back end :func:`outboard.trace.writes.open_write_trace` would take."""
    if scan and Features.WP_ASYNC in features and Features.WP_UNPOPULATED in features:
        return Finding("write trace", Verdict.OK, "PAGEMAP_SCAN, WP_ASYNC", "the kernel notes writes by itself")
    if Features.WP_HUGETLBFS_SHMEM in features:
        found, follows = "WP_HUGETLBFS_SHMEM only", "the first write to a page waits until a message has been read"
        return Finding("write trace", Verdict.NOTE, found, follows, _NEWER_KERNEL)
    if soft_dirty:
        found, follows = "soft-dirty pages only", "the VM is stopped while they are read and cleared"
        return Finding("write trace", Verdict.NOTE, found, follows, _NEWER_KERNEL)
    return Finding("write trace", Verdict.REFUSED, "none", "only --post-copy can give a VM away", _NEWER_KERNEL)


def injection() -> Iterator[Finding]:
    """Whether a userfaultfd can be made inside another process: tried on one of ours."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        # What it echoes it has been loaded for: before that there may be no libc in it yet.
        target.stdin.write(b"\n")
        target.stdin.flush()
        target.stdout.read(1)
        began = time.monotonic_ns()
        try:
            ours, _ = ptrace.inject_userfaultfd(target.pid)
        except OutboardError as error:
            mend = "run as root; kernel.yama.ptrace_scope must be below 3, a container needs CAP_SYS_PTRACE"
            yield Finding("injection", Verdict.REFUSED, str(error), "no running VM can be attached to", mend)
        else:
            took = (time.monotonic_ns() - began) / 1e6
            os.close(ours)
            yield Finding("injection", Verdict.OK, f"tried, {took:.1f} ms", "running VMs can be attached to")
        finally:
            target.kill()


def kvm() -> Iterator[Finding]:
    """Whether KVM runs guests: tried with one, once a boot."""
    if shutil.which(_QEMU) is None:
        return
    try:
        why_not = why_not_kvm(_QEMU, CPU, runtime_dir() / "kvm.json")
    except OSError as error:
        why_not = f"it could not be tried: {error}"
    if why_not is None:
        yield Finding("kvm", Verdict.OK, "a trial guest ran under it", "VMs run at the processor's speed")
    else:
        follows = "VMs run under TCG, many times slower; one that runs under KVM elsewhere cannot come here"
        mend = "load kvm_intel or kvm_amd; inside a VM, have nested virtualisation switched on"
        yield Finding("kvm", Verdict.NOTE, why_not, follows, mend)


def memory() -> Iterator[Finding]:
    """Room for guests: what Outboard starts is in memfds, what others start mostly in /dev/shm."""
    available = proc.meminfo()["MemAvailable"]
    yield Finding(
        "memory",
        Verdict.OK if available >= 1 << 30 else Verdict.NOTE,
        f"{size_text(available)} available",
        "VMs that start here, or come here, can have so much",
    )
    try:
        room = os.statvfs(_SHM)
    except OSError as error:
        found, follows = str(error), "a QEMU whose memory is to be a file there cannot start"
        yield Finding("shm", Verdict.NOTE, f"{_SHM}: {found}", follows, f"mount -t tmpfs tmpfs {_SHM}")
    else:
        free = size_text(room.f_bavail * room.f_frsize)
        yield Finding("shm", Verdict.OK, f"{_SHM}: {free} free", "for QEMUs that others start with memory there")
    pools = [f"{size_text(one.page_size)}: {one.free} of {one.total} free" for one in hugetlb.pools() if one.total]
    follows = 'VMs with page_size = "2MiB" can start here, or come here' if pools else "VMs have pages of 4 KiB"
    yield Finding("huge pages", Verdict.OK, "; ".join(pools) or "none reserved", follows)
    setting = transhuge.shmem_enabled()
    if setting in ("never", "deny"):
        follows, remedy = (
            "a VM that comes here keeps none of its large mappings, but for hugetlb pages",
            (f"echo advise > {transhuge.SHMEM_ENABLED}"),
        )
        yield Finding("large mappings", Verdict.NOTE, f"shmem_enabled is {setting}", follows, remedy)
    else:
        yield Finding("large mappings", Verdict.OK, f"shmem_enabled is {setting}", "VMs get and keep large mappings")


def qemu() -> Iterator[Finding]:
    """Whether QEMU is there, and can move device state without memory: asked of QEMU itself."""
    program = shutil.which(_QEMU)
    if program is None:
        yield Finding("qemu", Verdict.REFUSED, f"no {_QEMU} in PATH", "no VM can run here", _QEMU_PACKAGE)
        return
    commands = ("qmp_capabilities", "query-version", "query-migrate-capabilities", "quit")
    try:
        asked = subprocess.run(
            [program, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"],
            input="".join(json.dumps({"execute": command}) + "\n" for command in commands),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        messages = [json.loads(line) for line in asked.stdout.splitlines()]
        answers = [message["return"] for message in messages if "return" in message]
        version = "{major}.{minor}.{micro}".format(**answers[1]["qemu"])
        offered = {one["capability"] for one in answers[2]}
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        yield Finding("qemu", Verdict.REFUSED, f"{program}: {error}", "no VM can run here", _QEMU_PACKAGE)
        return
    missing = [name for name in _QEMU_NEEDS if name not in offered]
    if missing:
        found = f"{version} without {', '.join(missing)}"
        yield Finding("qemu", Verdict.REFUSED, found, "device state cannot move without memory", "a newer QEMU")
    else:
        follows = "device state can move without memory; both hosts need the same version"
        yield Finding("qemu", Verdict.OK, version, follows)


def network() -> Iterator[Finding]:
    """TAPs."""
    if Path("/dev/net/tun").exists():
        yield Finding("tap", Verdict.OK, "/dev/net/tun", "VMs can have a network")
    else:
        yield Finding("tap", Verdict.NOTE, "no /dev/net/tun", "VMs have no network", "modprobe tun")


def leases() -> Iterator[Finding]:
    """Whether the kernel tells of whoever opens a disk image for writing: tried on a file."""
    with tempfile.NamedTemporaryFile() as made, ImageFile(Path(made.name)) as image:
        # Whoever has it open for writing is in the way of a lease.
        made.file.close()
        granted = image.lease()
    if granted:
        yield Finding("file leases", Verdict.OK, "granted", "pages that a disk image holds can be dropped")
    else:
        found, mend = "refused", "sysctl fs.leases-enable=1"
        yield Finding("file leases", Verdict.NOTE, found, "what a disk image holds goes to swap all the same", mend)


def cpu_limits() -> Iterator[Finding]:
    """The cgroup controller that could slow vCPUs down."""
    version = cgroup.cpu_version()
    if version is None:
        found, follows = "no cgroup has the cpu controller", "pre-copy cannot hold back vCPUs that write by cgroups"
        yield Finding("cgroup cpu", Verdict.NOTE, found, follows, "mount a cgroup2 with cpu in cgroup.controllers")
    else:
        yield Finding("cgroup cpu", Verdict.OK, f"version {version}", "pre-copy can hold back vCPUs that write")
