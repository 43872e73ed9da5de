"""Starting and ending QEMU, as ``outboard run`` and ``outboard stop`` do.

QEMU gets its memory and its TAPs as open descriptors of files that have no name: nothing is left behind, however it
ends. It is a session of its own and survives us, and what it has to say goes to a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError, UnreachableError
from outboard.linux import hugetlb, memfd, pidfd, proc, sched, tun
from outboard.vmm import qemu_process
from outboard.vmm.accelerator import why_not_kvm
from outboard.vmm.arguments import qemu_arguments
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import ENGINE_SOCKET, LOG, QMP_SOCKET, Registry, VmRecord
from outboard.vmm.spec import MIB, VmSpec

_START_S = 30.0
_LOOK_S = 0.002
_HUGE = {2 * MIB: memfd.HugePages.MIB_2}


def _accelerator(spec: VmSpec, registry: Registry) -> tuple[Literal["kvm", "tcg"], str]:
    """What the VM will run on, and why."""
    if spec.accel != "auto":
        return spec.accel, "its description says so"
    why_not = why_not_kvm(spec.qemu, spec.cpu, registry.root / "kvm.json")
    if why_not is None:
        return "kvm", "a trial guest ran under it"
    return "tcg", f"no KVM: {why_not}"


def _make_memory(spec: VmSpec) -> int:
    """The file of the guest's RAM.

    :raise RefusedError: ``huge-pages``: there are too few of them.
    """
    huge = _HUGE.get(spec.page_bytes)
    if huge is not None:
        # The kernel sets them aside when QEMU maps the file, and QEMU would say no more than "cannot allocate memory".
        free = sum(pool.free - pool.reserved for pool in hugetlb.pools() if pool.page_size == spec.page_bytes)
        if free * spec.page_bytes < spec.memory_bytes:
            raise RefusedError(
                "huge-pages",
                f"{spec.name} needs {spec.memory_bytes // spec.page_bytes} huge pages of {spec.page_size}, and {free} "
                "are free; give the kernel more with sysctl vm.nr_hugepages",
            )
    try:
        return memfd.create(f"outboard-{spec.name}", spec.memory_bytes, huge)
    except OSError as error:
        raise KernelError(f"memfd_create of {spec.memory} for {spec.name}", error.errno or 0) from error


def _make_tap(name: str, bridge: str | None) -> int:
    """A TAP that is up, as a port of the bridge if one is named; its descriptor.

    :raise RefusedError: ``network``: the kernel did not want it.
    """
    try:
        fd = tun.open_tap(name)
        try:
            if bridge is not None:
                tun.add_to_bridge(bridge, name)
            tun.set_up(name)
        except KernelError:
            os.close(fd)
            raise
    except KernelError as error:
        hint = {
            errno.EBUSY: "an interface of that name exists already, or belongs to another bridge",
            errno.ENODEV: f"there is no bridge {bridge}; make it with ip link add {bridge} type bridge",
            errno.EPERM: "run as root",
        }.get(error.errno or 0, "see the system's log")
        raise RefusedError("network", f"TAP {name}: {error}; {hint}") from error
    return fd


@contextlib.contextmanager
def _descriptors(spec: VmSpec) -> Iterator[tuple[int, list[int]]]:
    """The RAM's file and the TAPs, open while QEMU starts."""
    with contextlib.ExitStack() as stack:
        memory = _make_memory(spec)
        stack.callback(os.close, memory)
        taps = []
        for network in spec.networks:
            taps.append(_make_tap(network.tap, network.bridge))
            stack.callback(os.close, taps[-1])
        yield memory, taps


def _start(spec: VmSpec, directory: Path, incoming: bool) -> subprocess.Popen[bytes]:
    with _descriptors(spec) as (memory, taps), (directory / LOG).open("wb") as log:
        arguments = qemu_arguments(spec, memory_fd=memory, tap_fds=taps, incoming=incoming)
        try:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                pass_fds=[memory, *taps],
                start_new_session=True,
                umask=0o117,
            )
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no program {spec.qemu} to run {spec.name} with; install QEMU") from error
        except OSError as error:
            raise KernelError(f"execve of {spec.qemu}", error.errno or 0) from error


def _wait_ready(spec: VmSpec, process: subprocess.Popen[bytes], directory: Path) -> None:
    """Wait until QEMU answers on its monitor.

    :raise OutboardError: it ended instead; the message holds what it said.
    :raise UnreachableError: it does neither.
    """
    deadline = time.monotonic() + _START_S
    ended = pidfd.open(process.pid)
    try:
        # QEMU opens its monitors in the order of its command line; with the last there the first is too.
        while not (directory / QMP_SOCKET).exists():
            if pidfd.wait(ended, _LOOK_S):
                break
            if time.monotonic() > deadline:
                raise UnreachableError(f"{spec.name}: {spec.qemu} did not open its monitor within {_START_S:g} s")
        else:
            with contextlib.suppress(UnreachableError):
                Monitor.connect(directory / ENGINE_SOCKET, _START_S).close()
                return
        # Its sockets close a moment before it has ended.
        if pidfd.wait(ended, 1.0):
            said = (directory / LOG).read_text(errors="replace").strip()
            raise OutboardError(f"{spec.name}: {spec.qemu} exited with {process.wait()}: {said or 'it said nothing'}")
        raise UnreachableError(f"{spec.name}: {spec.qemu} did not answer on its monitor within {_START_S:g} s")
    finally:
        os.close(ended)


def launch(spec: VmSpec, registry: Registry, incoming: bool = False) -> VmRecord:
    """Start a VM; returns when its monitor answers.

    The TAPs are made in the network namespace of the calling thread.

    :param incoming: the VM waits for ``migrate-incoming`` instead of booting.
    :raise RefusedError: ``name-taken``, ``network``, ``huge-pages``.
    :raise NotFoundError: there is no such QEMU.
    :raise OutboardError: QEMU ended at once; the message holds what it said.
    :raise UnreachableError: QEMU does not answer.
    """
    accelerator, reason = _accelerator(spec, registry)
    settled = spec.settled(accelerator)
    with registry.reserve(spec.name) as directory:
        process = _start(settled, directory, incoming)
        try:
            _wait_ready(settled, process, directory)
            # It started as quickly as whoever started it runs; from here on it is an ordinary process.
            sched.favour_no_more(thread.tid for thread in proc.threads(process.pid))
            record = VmRecord(
                name=spec.name,
                pid=process.pid,
                start_time=proc.start_time(process.pid),
                directory=directory,
                accelerator=accelerator,
                accelerator_reason=reason,
                memory_bytes=spec.memory_bytes,
                vcpus=spec.vcpus,
                guest_agent=spec.guest_agent,
                started=time.time(),
            )
            registry.add(record, settled.to_toml())
        except BaseException:
            process.kill()
            process.wait()
            raise
    # It is meant to outlive this object, which would otherwise warn of it; init or the next wait reaps it.
    process.returncode = 0
    return record


def stop(record: VmRecord, registry: Registry) -> None:
    """End a VM's QEMU at once, like pulling the plug, and forget the VM. Idempotent.

    :raise UnreachableError: the process does not end.
    """
    if record.alive:
        ended = pidfd.open(record.pid)
        try:
            # The pid may have been another's by the time it was opened.
            if record.alive:
                if not qemu_process.end(ended):
                    raise UnreachableError(
                        f"{record.name}: QEMU (process {record.pid}) does not end, not even by SIGKILL"
                    )
                _reap(record.pid)
        finally:
            os.close(ended)
    registry.remove(record.name)


def end_unrecorded(name: str, registry: Registry) -> bool:
    """End a QEMU that was started as ``name`` by somebody who did not live to record it; whether there was one.

    It is known by its working directory, which is the VM's.

    :raise RefusedError: ``name-taken``: a VM of that name is being started.
    :raise UnreachableError: the process does not end.
    """
    # A name that comes from another host makes no path.
    if name not in registry.unrecorded():
        return False
    with registry.reserve(name) as directory:
        found = list(_at_home_in(directory))
        for pid in found:
            process = pidfd.open(pid)
            try:
                if not qemu_process.end(process):
                    raise UnreachableError(f"{name}: QEMU (process {pid}) does not end, not even by SIGKILL")
            finally:
                os.close(process)
        # While the name is ours: nobody else's directory goes.
        registry.remove(name)
    return bool(found)


def _at_home_in(directory: Path) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        # Most processes live elsewhere, some end meanwhile, and not all are QEMUs.
        with contextlib.suppress(OSError, RefusedError):
            if (entry / "cwd").samefile(directory):
                qemu_process.check(int(entry.name))
                yield int(entry.name)


def _reap(pid: int) -> None:
    """Take the exit status, if this process is the one that started it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
