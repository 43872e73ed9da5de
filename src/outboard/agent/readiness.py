"""Whether this host could take a VM: what its launch would need, looked at without starting anything.

What is true now may not be when the VM comes; then its launch says so, and the VM goes on at its source.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outboard.agent.promises import configured, pools_of, promise_of, promises
from outboard.errors import NotFoundError, RefusedError, SpecError
from outboard.linux import hugetlb, proc
from outboard.migrate.plan import Blocker
from outboard.vmm.accelerator import why_not_kvm
from outboard.vmm.registry import Registry
from outboard.vmm.spec import VmSpec, parse_spec

_INTERFACES = Path("/sys/class/net")
_VERSION = re.compile(r"version (\d+)\.(\d+)")
_ASK_S = 10.0


def blockers(spec: str, qemu: tuple[int, int] | None, registry: Registry, *, here: str) -> list[Blocker]:
    """What stands in the way here, each with what to do.

    :param spec: the VM's description, TOML from another host. :param qemu: the version that runs it there.
    :param here: this host's name.
    """
    try:
        parsed = parse_spec(spec, "the VM's description")
    except SpecError as error:
        return [Blocker(here, "spec", str(error))]
    found = [
        *_name(parsed, registry),
        *_memory(parsed),
        *_swap(parsed, registry),
        *_program(parsed, qemu, registry),
        *_things(parsed),
    ]
    return [Blocker(here, reason, words) for reason, words in found]


def _name(spec: VmSpec, registry: Registry) -> Iterator[tuple[str, str]]:
    try:
        record = registry.get(spec.name)
    except NotFoundError:
        return
    yield (
        "name-taken",
        f"a VM named {spec.name} runs here already (process {record.pid}); end it with outboard stop {spec.name}",
    )


def _memory(spec: VmSpec) -> Iterator[tuple[str, str]]:
    if spec.page_bytes == 4096:
        free, what = proc.meminfo()["MemAvailable"], "memory available"
        mend = "move another VM away, or give this host more"
    else:
        pools = [pool for pool in hugetlb.pools() if pool.page_size == spec.page_bytes]
        free = sum((pool.free - pool.reserved) * pool.page_size for pool in pools)
        what, mend = f"in free huge pages of {spec.page_size}", "raise sysctl vm.nr_hugepages"
    if free < spec.memory_bytes:
        yield "no-memory", f"{spec.name} needs {spec.memory_bytes >> 20} MiB, {free >> 20} MiB are {what}; {mend}"


def _swap(spec: VmSpec, registry: Registry) -> Iterator[tuple[str, str]]:
    try:
        config = configured()
        pools = None if config is None else pools_of(config)
        if pools is not None:
            pools.admit(spec.name, promise_of(spec), promises(registry))
    except RefusedError as error:
        yield error.reason, str(error)


def _program(spec: VmSpec, there: tuple[int, int] | None, registry: Registry) -> Iterator[tuple[str, str]]:
    program = shutil.which(spec.qemu)
    if program is None:
        yield "no-qemu", f"there is no program {spec.qemu}; install QEMU as it is on the source"
        return
    ours = version_of(program)
    if there is not None and ours is not None and ours != there:
        yield (
            "qemu-version",
            f"{spec.qemu} is {ours[0]}.{ours[1]} here, {spec.name} runs under {there[0]}.{there[1]}; both hosts "
            "need the same version",
        )
    if spec.accel == "kvm" and (why := why_not_kvm(spec.qemu, spec.cpu, registry.root / "kvm.json")) is not None:
        yield "no-kvm", f"{spec.name} runs under KVM, which is not to be had here: {why}"


def version_of(program: str) -> tuple[int, int] | None:
    """A QEMU's version, major and minor, as it says itself; None: it does not."""
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_ASK_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(said)
    return None if match is None else (int(match[1]), int(match[2]))


def _things(spec: VmSpec) -> Iterator[tuple[str, str]]:
    """The files and interfaces that it names."""
    boot = [] if spec.boot is None else [spec.boot.kernel, spec.boot.initrd]
    for path in [*boot, *(disk.path for disk in spec.disks)]:
        if path is not None and not Path(path).exists():
            yield (
                "missing-file",
                f"{spec.name} needs {path}, which is not here; put it on storage that both hosts reach",
            )
    for network in spec.networks:
        if (_INTERFACES / network.tap).exists():
            yield "network", f"an interface named {network.tap} exists already; remove it, or name another TAP"
        if network.bridge is not None and not (_INTERFACES / network.bridge / "bridge").exists():
            yield (
                "network",
                f"there is no bridge {network.bridge}; make it with ip link add {network.bridge} type bridge",
            )
