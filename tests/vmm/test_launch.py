"""QEMUs that are started and ended; their guests stay at the first instruction."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from outboard.errors import NotFoundError, OutboardError, RefusedError
from outboard.linux import hugetlb, pidfd, proc
from outboard.vmm import launch as launching
from outboard.vmm.attach import attach
from outboard.vmm.launch import end_unrecorded, launch, stop
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import Disk, Network, VmSpec, parse_spec
from tests.support.machine import huge_pages
from tests.support.network import Network as Namespace
from tests.support.requirements import require

SPEC = VmSpec(name="web", memory="64MiB", accel="tcg", extra_args=["-S"])


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    require("qemu")
    made = Registry(tmp_path)
    yield made
    for record in made.list():
        stop(record, made)
    assert made.list() == []


@pytest.fixture
def record(registry: Registry) -> VmRecord:
    return launch(SPEC, registry)


def changed(**changes: object) -> VmSpec:
    return msgspec.structs.replace(SPEC, **changes)


def test_a_vm_is_started_and_ended(registry: Registry, record: VmRecord) -> None:
    assert registry.get("web") == record
    assert (record.accelerator, record.memory_bytes, record.vcpus) == ("tcg", 64 << 20, 1)
    with Monitor.connect(record.qmp_socket) as people, Monitor.connect(record.engine_socket) as ours:
        assert people.peer_pid == ours.peer_pid == record.pid
        assert ours.execute("query-status")["status"] == "prelaunch"
        assert ours.execute("query-name") == {"name": "web"}
    stop(record, registry)
    stop(record, registry)
    assert not pidfd.alive(record.pid)
    assert not record.directory.exists()


def test_its_memory_can_be_attached_to(record: VmRecord) -> None:
    with record.attach() as guest:
        assert (guest.name, guest.pid, guest.agent_path) == ("web", record.pid, record.agent_socket)
        assert [(region.first, region.pages, region.gpa) for region in guest.regions] == [(0, 16384, 0)]
        assert all(region.mapping.shared for region in guest.regions)
    with attach(pid=record.pid) as guest:
        assert guest.agent_path is not None
        assert record.agent_socket is not None
        assert guest.agent_path.samefile(record.agent_socket)


def test_sockets_and_logs_are_not_for_everybody(record: VmRecord) -> None:
    assert record.directory.stat().st_mode & 0o007 == 0
    for path in (record.qmp_socket, record.engine_socket, record.agent_socket, record.console):
        assert path is not None
        assert path.stat().st_mode & 0o777 == 0o660


def test_the_record_says_how_to_start_it_elsewhere(registry: Registry) -> None:
    record = launch(changed(accel="auto"), registry)
    again = parse_spec(record.spec_text(), "the record")
    assert again.accel == record.accelerator
    assert again == msgspec.structs.replace(SPEC, accel=again.accel)


def test_a_vm_that_is_expected_waits_for_its_state(registry: Registry) -> None:
    record = launch(changed(extra_args=[]), registry, incoming=True)
    with Monitor.connect(record.engine_socket) as monitor:
        assert monitor.execute("query-status")["status"] == "inmigrate"


def test_a_name_is_taken_once(registry: Registry, record: VmRecord) -> None:
    with pytest.raises(RefusedError) as caught:
        launch(SPEC, registry)
    assert caught.value.reason == "name-taken"
    assert record.alive


def test_what_qemu_says_when_it_fails_is_in_the_error(registry: Registry) -> None:
    with pytest.raises(OutboardError, match=r"exited with 1: .*'nonsense' is not a valid device model"):
        launch(changed(extra_args=["-device", "nonsense"]), registry)
    with pytest.raises(OutboardError, match=r"web: .* exited with 1: .*no-such-kernel"):
        launch(
            parse_spec('name = "web"\nmemory = "64MiB"\naccel = "tcg"\nboot.kernel = "/no-such-kernel"', "x"), registry
        )
    with pytest.raises(NotFoundError, match="there is no program /nowhere/qemu"):
        launch(changed(qemu="/nowhere/qemu"), registry)
    assert registry.list() == []
    assert not list((registry.root / "vms").iterdir())


def test_a_disk_is_what_its_path_says_even_with_a_comma(registry: Registry, tmp_path: Path) -> None:
    image = tmp_path / "a,b.img"
    image.write_bytes(bytes(1 << 20))
    record = launch(changed(disks=[Disk(path=str(image), read_only=True)]), registry)
    with Monitor.connect(record.engine_socket) as monitor:
        (disk,) = monitor.execute("query-block")
        assert disk["inserted"]["file"] == str(image)
        assert disk["inserted"]["ro"] is True


def test_huge_pages_that_are_not_there_are_refused(registry: Registry) -> None:
    free = sum(pool.free for pool in hugetlb.pools() if pool.page_size == 2 << 20)
    with pytest.raises(RefusedError, match=f"and {free} are free") as caught:
        launch(changed(memory=f"{2 * free + 2}MiB", page_size="2MiB"), registry)
    assert caught.value.reason == "huge-pages"


def test_memory_is_made_of_huge_pages(registry: Registry) -> None:
    with huge_pages(16):
        record = launch(changed(memory="32MiB", page_size="2MiB", vcpus=2), registry)
        with record.attach() as guest:
            assert [region.page_size for region in guest.regions] == [2 << 20]
            assert [vcpu.index for vcpu in guest.vcpus] == [0, 1]


def test_a_vm_outlives_the_command_that_started_it(registry: Registry, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from outboard.vmm.launch import launch\n"
        "from outboard.vmm.registry import Registry; from outboard.vmm.spec import parse_spec\n"
        "launch(parse_spec(sys.argv[1], 'argument'), Registry(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-W", "error", "-c", program, SPEC.to_toml(), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, start_new_session=True)
    assert done.stderr == ""
    record = registry.get("web")
    assert os.getsid(record.pid) == record.pid
    with Monitor.connect(record.engine_socket) as monitor:
        assert monitor.peer_pid == record.pid


def test_only_memory_and_taps_are_inherited(record: VmRecord) -> None:
    links = proc.descriptors(record.pid)
    assert links[0] == "/dev/null"
    assert links[1] == links[2] == str(record.directory / "qemu.log")
    ours = set(proc.descriptors(os.getpid()).values())
    assert not {link for link in links.values() if link.startswith("pipe:")} & ours


@pytest.mark.slow
def test_stop_ends_a_qemu_that_does_not_answer(registry: Registry, record: VmRecord) -> None:
    os.kill(record.pid, signal.SIGSTOP)
    proc.wait_stopped(record.pid)
    stop(record, registry)
    assert not pidfd.alive(record.pid)


def test_stop_forgets_a_vm_that_has_ended_by_itself(registry: Registry, record: VmRecord) -> None:
    os.kill(record.pid, signal.SIGKILL)
    os.waitpid(record.pid, 0)
    stop(record, registry)
    assert registry.list() == []


class TestNetworks:
    @pytest.fixture
    def namespace(self) -> Iterator[Namespace]:
        require("root")
        with Namespace() as made:
            yield made

    def test_a_tap_lives_as_long_as_its_vm(self, registry: Registry, namespace: Namespace) -> None:
        spec = changed(networks=[Network(tap="tap-web", bridge="guests")])
        record = namespace.call(lambda: launch(spec, registry))
        assert "tap-web" in namespace.ip("link", "show", "master", "guests")
        assert "UP" in namespace.ip("link", "show", "tap-web")
        with Monitor.connect(record.engine_socket) as monitor:
            assert str(spec.settled("tcg").networks[0].mac) in monitor.human("info network")
        stop(record, registry)
        assert "tap-web" not in namespace.ip("link")

    def test_what_the_kernel_refuses_is_told_with_a_way_out(self, registry: Registry, namespace: Namespace) -> None:
        for spec, message in (
            (changed(networks=[Network(tap="tap-web", bridge="no-bridge")]), "ip link add no-bridge type bridge"),
            (changed(networks=[Network(tap="guests")]), "TAP guests: TUNSETIFF"),
        ):
            with pytest.raises(RefusedError, match=message) as caught:
                namespace.call(partial(launch, spec, registry))
            assert caught.value.reason == "network"
        assert "tap-web" not in namespace.ip("link")

    def test_a_tap_that_is_taken_is_refused(self, registry: Registry, namespace: Namespace) -> None:
        first = changed(networks=[Network(tap="tap-web")])
        namespace.call(lambda: launch(first, registry))
        with pytest.raises(RefusedError, match="exists already"):
            namespace.call(lambda: launch(msgspec.structs.replace(first, name="other"), registry))


def test_sockets_have_room_for_a_long_runtime_directory(tmp_path: Path) -> None:
    require("qemu")
    registry = Registry(tmp_path / ("a" * 100))
    record = launch(SPEC, registry)
    try:
        assert len(str(record.engine_socket)) > 108
        with Monitor.connect(record.engine_socket) as monitor:
            assert monitor.peer_pid == record.pid
        with socket.socket(socket.AF_UNIX) as direct, pytest.raises(OSError, match="too long"):
            direct.connect(str(record.engine_socket))
    finally:
        stop(record, registry)


def started_and_forgotten(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> int:
    """Start a QEMU and die before it is recorded; its pid."""
    read, write = os.pipe()

    def die(_spec: VmSpec, process: subprocess.Popen[bytes], _directory: Path) -> None:
        os.write(write, str(process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(launching, "_wait_ready", die)
    child = os.fork()
    if child == 0:
        launch(SPEC, registry, incoming=True)
    pid = int(os.read(read, 20))
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    return pid


def test_a_qemu_whose_starter_died_is_found_and_ended(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = started_and_forgotten(registry, monkeypatch)
    assert pidfd.alive(pid)
    assert registry.unrecorded() == {"web"}
    assert not end_unrecorded("../vms/web", registry)
    assert not end_unrecorded("db", registry)
    assert pidfd.alive(pid)
    assert end_unrecorded("web", registry)
    assert not pidfd.alive(pid)
    assert not (registry.root / "vms" / "web").exists()
    assert not end_unrecorded("web", registry)


def test_one_that_is_recorded_or_being_started_is_left_alone(registry: Registry, record: VmRecord) -> None:
    assert not end_unrecorded("web", registry)
    assert record.alive
    with registry.reserve("db") as directory:
        starting = subprocess.Popen(["sleep", "60"], cwd=directory)
        try:
            with pytest.raises(RefusedError) as refused:
                end_unrecorded("db", registry)
            assert refused.value.reason == "name-taken"
        finally:
            starting.kill()
            starting.wait()


def test_who_only_looks_around_in_a_directory_is_left_alone(registry: Registry) -> None:
    with registry.reserve("web") as directory:
        pass
    visitor = subprocess.Popen(["sleep", "60"], cwd=directory)
    try:
        assert not end_unrecorded("web", registry)
        assert visitor.poll() is None
    finally:
        visitor.kill()
        visitor.wait()
