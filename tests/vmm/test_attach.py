"""Attaching to real QEMUs: what is found, what is refused, and that nothing stays behind."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import OutboardError, PeerError, RefusedError, UnreachableError, UsageError
from outboard.linux import proc, ptrace
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from outboard.vmm.attach import attach
from outboard.vmm.guest import Guest
from outboard.vmm.monitor import Monitor
from tests.support.machine import Machine
from tests.support.requirements import require

MIB = 256
"""Pages."""


@pytest.fixture(autouse=True)
def _needs() -> None:
    require("qemu", "root")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    require("qemu")
    with Machine(64) as running:
        yield running


def refusal(**how: Path | int) -> str:
    """The reason for which an attach is refused."""
    before = set(proc.descriptors(os.getpid()))
    with pytest.raises(RefusedError) as caught:
        attach(**how)  # type: ignore[arg-type]  # either key, one of the two
    assert set(proc.descriptors(os.getpid())) == before
    print(caught.value)
    return caught.value.reason


def layout(guest: Guest) -> list[tuple[int, int, int]]:
    return [(region.first, region.pages, region.gpa) for region in guest.regions]


DIMM = ("-m", "64M,slots=2,maxmem=1G", "-object", "memory-backend-memfd,share=on,id=d,size=128M")


@pytest.mark.parametrize(
    ("mebibytes", "machine_type", "arguments", "expected"),
    [
        (64, "q35", (), [(0, 64 * MIB, 0)]),
        (2816, "q35", (), [(0, 2048 * MIB, 0), (2048 * MIB, 768 * MIB, 1 << 32)]),
        (4096, "pc", (), [(0, 3072 * MIB, 0), (3072 * MIB, 1024 * MIB, 1 << 32)]),
        (64, "q35", (*DIMM, "-device", "pc-dimm,memdev=d"), [(0, 64 * MIB, 0), (64 * MIB, 128 * MIB, 1 << 32)]),
        (64, "pc-q35-3.1", (), [(0, 64 * MIB, 0)]),
    ],
)
def test_pages_are_where_the_guest_has_them(
    mebibytes: int, machine_type: str, arguments: tuple[str, ...], expected: list[tuple[int, int, int]]
) -> None:
    with Machine(mebibytes, *arguments, machine=machine_type) as vm, attach(qmp=vm.qmp) as guest:
        assert layout(guest) == expected
        assert guest.pages == sum(pages for _, pages, _ in expected)
        for region in guest.regions:
            for page in (region.first + 16, region.first + region.pages // 2, region.first + region.pages - 1):
                said = f"page {page}".encode()
                guest.memory.write(page, memoryview(said.ljust(4096, b"\0")))
                gpa = region.gpa + (page - region.first) * 4096
                dump = vm.directory / "dump"
                guest.monitor.execute("pmemsave", val=gpa, size=4096, filename=str(dump))
                assert dump.read_bytes().rstrip(b"\0") == said
                assert guest.pages_of_pfns(np.array([gpa // 4096])) == page


def test_numa_nodes_are_regions_of_their_own() -> None:
    nodes = [f"memory-backend-memfd,share=on,id=m{node},size=64M" for node in (0, 1)]
    arguments = [word for node in nodes for word in ("-object", node)]
    arguments += ["-numa", "node,memdev=m0", "-numa", "node,memdev=m1"]
    with Machine(128, *arguments, backend="default") as vm, attach(qmp=vm.qmp) as guest:
        assert layout(guest) == [(0, 64 * MIB, 0), (64 * MIB, 64 * MIB, 64 << 20)]
        assert [region.memdev for region in guest.regions] == ["/objects/m0", "/objects/m1"] or [
            region.memdev for region in guest.regions
        ] == ["m0", "m1"]
        edge = memoryview(bytearray(os.urandom(8192)))
        guest.memory.write(64 * MIB - 1, edge)
        back = memoryview(bytearray(8192))
        guest.memory.read_into(64 * MIB - 1, back)
        assert back == edge


def test_the_firmware_does_not_change_the_layout() -> None:
    with Machine(64) as vm, attach(qmp=vm.qmp) as guest:
        fresh = layout(guest)
        before = guest.monitor.human("info mtree -f")
        guest.monitor.execute("cont")
        deadline = time.monotonic() + 20
        while guest.monitor.human("info mtree -f") == before:
            assert time.monotonic() < deadline, "the firmware maps nothing"
        guest.close()
        with attach(qmp=vm.qmp) as again:
            assert layout(again) == fresh


@pytest.mark.parametrize("backend", ["file", "memfd", "shared"])
def test_every_kind_of_shared_memory(backend: str) -> None:
    with Machine(64, backend=backend) as vm, attach(qmp=vm.qmp) as guest:
        words = memoryview(b"written from outside".ljust(4096, b"\0"))
        guest.memory.write(1000, words)
        assert "0x74697277" in guest.monitor.human(f"xp /1wx {1000 * 4096:#x}")


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("anonymous", "anonymous-memory"), ("default", "anonymous-memory"), ("private", "not-shared")],
)
def test_memory_that_is_not_shared(backend: str, reason: str) -> None:
    with Machine(64, backend=backend) as vm:
        assert refusal(qmp=vm.qmp) == reason


def test_memory_that_other_vms_map() -> None:
    window = ("-object", "memory-backend-memfd,share=on,id=w,size=1M", "-device", "ivshmem-plain,memdev=w")
    with Machine(64, *window) as vm:
        assert refusal(qmp=vm.qmp) == "ivshmem"


def test_a_device_that_another_process_serves() -> None:
    with tempfile.TemporaryDirectory() as directory:
        sock, disk = Path(directory) / "vub.sock", Path(directory) / "disk"
        disk.write_bytes(bytes(1 << 20))
        daemon = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--blockdev", f"file,node-name=d,filename={disk}"),
                *("--export", f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={sock}"),
            ]
        )
        try:
            deadline = time.monotonic() + 20
            while not sock.exists():
                assert daemon.poll() is None
                assert time.monotonic() < deadline
            arguments = ("-chardev", f"socket,id=v,path={sock}", "-device", "vhost-user-blk-pci,chardev=v")
            with Machine(64, *arguments) as vm:
                assert refusal(qmp=vm.qmp) == "vhost-user"
        finally:
            daemon.kill()
            daemon.wait()


@pytest.mark.parametrize("capability", ["postcopy-ram", "background-snapshot"])
def test_qemus_own_page_faults(machine: Machine, capability: str) -> None:
    with Monitor.connect(machine.qmp) as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
    assert refusal(qmp=machine.qmp) == "uffd-taken"
    with Monitor.connect(machine.qmp) as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=[{"capability": capability, "state": False}])
    attach(qmp=machine.qmp).close()


def test_another_managers_userfaultfd(machine: Machine) -> None:
    with attach(qmp=machine.qmp) as guest:
        region = guest.regions[0]
        thread = guest.emulator_thread()
    ours, theirs = ptrace.inject_userfaultfd(machine.pid, thread)
    with Userfaultfd(ours) as uffd:
        uffd.api(Features(0))
        # Open, but nothing of the guest is registered: that is ours from an earlier time, or a device's.
        attach(qmp=machine.qmp).close()
        for mode in (Mode.MISSING, Mode.WP):
            uffd.register(region.hva, 1 << 20, mode)
            assert refusal(qmp=machine.qmp) == "uffd-taken"
            uffd.unregister(region.hva, 1 << 20)
        attach(qmp=machine.qmp).close()
        ptrace.close_in_target(machine.pid, theirs, thread)


def test_without_privilege(machine: Machine) -> None:
    """A child without capabilities; it may not even look at the process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0:
                with pytest.raises(RefusedError, match="run as root") as caught:
                    attach(qmp=machine.qmp)
                status = 0 if caught.value.reason == "no-privilege" else 2
        except BaseException as error:  # noqa: BLE001  # the parent's tests must not run on in the child
            print(error, file=sys.stderr)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "monitor",
    [
        ["-mon", "chardev=m,mode=control", "-chardev", "socket,id=m,server=on,wait=off,path={path}"],
        ["-mon", "m,mode=control", "-chardev", "socket,path={path},server=on,wait=off,id=m"],
        ["--qmp", "unix:{path},server=on,wait=off"],
    ],
)
def test_by_pid_when_the_first_monitor_is_taken(monitor: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        arguments = [word.replace("{path}", f"{directory}/second.sock") for word in monitor]
        with Machine(64, *arguments) as vm, Monitor.connect(vm.qmp), attach(pid=vm.pid) as guest:
            assert guest.pid == vm.pid


@pytest.mark.slow
def test_by_pid_when_its_only_monitor_is_taken(machine: Machine) -> None:
    with Monitor.connect(machine.qmp), pytest.raises(UnreachableError, match="somebody else is connected to it"):
        attach(pid=machine.pid)


def test_by_pid_from_another_working_directory_and_with_commas() -> None:
    with tempfile.TemporaryDirectory() as directory:
        odd = Path(directory) / "a,b.sock"
        with (
            Machine(64, "-qmp", f"unix:{str(odd).replace(',', ',,')},server=on,wait=off") as vm,
            Monitor.connect(vm.qmp),
        ):
            attach(pid=vm.pid).close()


def test_by_pid_of_what_is_no_qemu() -> None:
    assert refusal(pid=os.getpid()) == "not-qemu"
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert refusal(pid=ended.pid) == "not-qemu"


def test_by_pid_of_a_qemu_without_monitor() -> None:
    with subprocess.Popen(["qemu-system-x86_64", "-S", "-accel", "tcg", "-display", "none", "-nodefaults"]) as mute:
        try:
            deadline = time.monotonic() + 20
            while "qemu" not in Path(f"/proc/{mute.pid}/exe").readlink().name:
                assert time.monotonic() < deadline
            assert refusal(pid=mute.pid) == "no-monitor"
        finally:
            mute.kill()


def test_by_a_socket_that_is_not_qemus(tmp_path: Path) -> None:
    """Somebody who talks like QEMU could point at another VM's memory."""
    path = tmp_path / "qmp.sock"
    talk = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
client, _ = listener.accept()
client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\\n')
client.recv(4096)
client.sendall(b'{"return": {}}\\n')
client.recv(4096)
"""
    with subprocess.Popen([sys.executable, "-c", talk, str(path)], stdout=subprocess.PIPE) as fake:
        assert fake.stdout is not None
        fake.stdout.readline()
        assert refusal(qmp=path) == "not-qemu"
        fake.kill()


def test_either_a_socket_or_a_process() -> None:
    with pytest.raises(UsageError):
        attach()
    with pytest.raises(UsageError):
        attach(qmp=Path("/run/x"), pid=1)


def test_threads_and_names() -> None:
    with Machine(64, "-smp", "3", "-name", "ducks,debug-threads=on") as vm, attach(qmp=vm.qmp) as guest:
        assert guest.name == "ducks"
        assert [vcpu.index for vcpu in guest.vcpus] == [0, 1, 2]
        names = {thread.tid: thread.name for thread in proc.threads(vm.pid)}
        assert all(re.match(r"CPU \d/TCG", names[vcpu.tid]) for vcpu in guest.vcpus)
        assert guest.emulator_thread() == vm.pid
        assert guest.agent_path is None


def test_the_agents_socket_is_found(tmp_path: Path) -> None:
    for form in (
        "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        '{"driver":"virtserialport","chardev":"agent","name":"org.qemu.guest_agent.0"}',
    ):
        path = tmp_path / "agent.sock"
        arguments = ("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={path},server=on,wait=off")
        with Machine(64, *arguments, "-device", form) as vm, attach(qmp=vm.qmp) as guest:
            assert guest.agent_path == path
        path.unlink()


def test_threads_that_are_not_qemus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "threads", lambda _pid: [proc.Thread(1, "init")])
    with pytest.raises(PeerError, match=r"which process .* does not have"):
        attach(qmp=machine.qmp)


def test_attaching_leaves_nothing(machine: Machine) -> None:
    ours, theirs = set(proc.descriptors(os.getpid())), set(proc.descriptors(machine.pid))
    files = [mapping for mapping in proc.maps(machine.pid) if mapping.shared]
    for _ in range(3):
        with attach(qmp=machine.qmp) as guest:
            assert guest.monitor.execute("query-status")["status"] == "prelaunch"
        guest.close()
    assert set(proc.descriptors(os.getpid())) == ours
    # QEMU closes its end of the last connection when it comes to it.
    deadline = time.monotonic() + 20
    while not set(proc.descriptors(machine.pid)) <= theirs:
        assert time.monotonic() < deadline, "QEMU has descriptors that it had not before"
    assert [mapping for mapping in proc.maps(machine.pid) if mapping.shared] == files


def test_qemu_ends_while_we_attach() -> None:
    with Machine(64) as vm:
        path = vm.qmp
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(os.fspath(path))
        vm.kill()
        with pytest.raises(OutboardError):
            attach(qmp=path)
        with pytest.raises(OutboardError):
            attach(pid=vm.pid)
