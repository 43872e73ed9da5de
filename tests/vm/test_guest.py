"""The test guest itself: what tests, bench and demo take for granted."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from guest.build import COMMAND_LINE
from outboard.errors import OutboardError
from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import QemuGuest
from outboard.vmm.guest_agent import GuestAgent
from outboard.vmm.launch import launch, stop
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import parse_spec
from tests.support.machine import BOOT_S, image
from tests.support.network import Network
from tests.support.requirements import require

pytestmark = pytest.mark.slow
ADDRESS = "10.77.0.11"
WORKING_SET_MIB = 64
SEED = np.uint64(0x6F7574626F617264)
"""As in dirty.c."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    require("root", "qemu")
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def vm(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmRecord]:
    registry = Registry(tmp_path_factory.mktemp("run"))
    files = image()
    spec = parse_spec(
        f'name = "web"\nmemory = "1GiB"\naccel = "tcg"\n\n'
        f'[boot]\nkernel = "{files.kernel}"\ninitrd = "{files.initrd}"\n'
        f'append = "{COMMAND_LINE} ip={ADDRESS}"\n\n[[networks]]\ntap = "tap-web"\nbridge = "guests"\n',
        "the test's VM",
    )
    record = network.call(partial(launch, spec, registry))
    try:
        deadline = time.monotonic() + BOOT_S
        while b"outboard-guest ready" not in record.console.read_bytes():
            assert time.monotonic() < deadline, record.console.read_text()
            time.sleep(0.02)
        yield record
    finally:
        stop(record, registry)


class Job:
    """A conversation with ``dirty``."""

    def __init__(self, network: Network) -> None:
        self._socket = network.call(lambda: socket.create_connection((ADDRESS, 7000), timeout=60))
        self._answers = self._socket.makefile("r")

    def ask(self, line: str) -> str:
        self._socket.sendall(line.encode() + b"\n")
        return self._answers.readline().rstrip("\n")

    def stats(self) -> tuple[int, float]:
        match = re.fullmatch(r"writes=(\d+) gap_ms=(\d+\.\d)", self.ask("stats"))
        assert match is not None
        return int(match[1]), float(match[2])

    def writes(self) -> int:
        return self.stats()[0]

    def gap_ms(self) -> float:
        return self.stats()[1]

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


@pytest.fixture
def job(vm: VmRecord, network: Network) -> Iterator[Job]:  # noqa: ARG001 (the guest must run)
    made = Job(network)
    try:
        yield made
        made.ask("stop")
    finally:
        made.close()


def test_memcached_answers(vm: VmRecord, network: Network) -> None:  # noqa: ARG001
    with network.call(lambda: socket.create_connection((ADDRESS, 11211), timeout=10)) as client:
        client.sendall(b"set key 0 0 5\r\nvalue\r\nget key\r\n")
        with client.makefile("rb") as answers:
            assert [answers.readline() for _ in range(4)] == [
                b"STORED\r\n",
                b"VALUE key 0 5\r\n",
                b"value\r\n",
                b"END\r\n",
            ]


def test_the_agent_runs_programs_and_dirty_among_them(vm: VmRecord, job: Job) -> None:
    assert vm.agent_socket is not None
    assert job.ask("start 1 0") == "ok 256"
    with GuestAgent(vm.agent_socket, 10.0) as agent:
        status, output = agent.run("/bin/dirty", "verify")
        assert (status, output) == (0, b"ok 256\n")
        assert agent.run("/bin/dirty", "nonsense")[0] == 1


def test_writes_are_paced_counted_and_verified(job: Job) -> None:
    pages = WORKING_SET_MIB * 256
    assert job.ask(f"start {WORKING_SET_MIB} 5000") == f"ok {pages}"
    began, before = time.monotonic(), job.writes()
    while job.writes() - before < 5000:
        assert time.monotonic() < began + 30
        assert job.ask("verify") == f"ok {pages}"
    assert time.monotonic() - began > 0.5, "more than its rate"
    assert job.ask("stop") == "ok"
    before = job.writes()
    assert job.ask("verify") == f"ok {pages}"
    assert job.writes() == before


def test_it_answers_others_meanwhile(job: Job, network: Network) -> None:
    other = Job(network)
    try:
        job.ask("start 16 1000")
        assert job.writes() <= other.writes()
        assert other.ask("churn 64") == "ok"
        assert other.ask("verify") == "ok 4096"
    finally:
        other.close()


def test_the_longest_gap_is_that_of_a_machine_that_stood_still(vm: VmRecord, job: Job) -> None:
    job.ask("reset")
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        proc.wait_stopped(vm.pid)
        time.sleep(0.3)
    finally:
        os.kill(vm.pid, signal.SIGCONT)
    while job.gap_ms() < 280:
        pass
    job.ask("reset")
    assert job.gap_ms() < 280


@pytest.mark.parametrize("line", ["", "nonsense", "start", "start 1", "start 0 1", "start 1 1 1", "churn x", "x" * 99])
def test_what_is_no_command_is_an_error(job: Job, line: str) -> None:
    assert job.ask(line).startswith("error")


@contextmanager
def paused(guest: QemuGuest) -> Iterator[None]:
    guest.monitor.execute("stop")
    try:
        yield
    finally:
        guest.monitor.execute("cont")


class TestCorruption:
    """Whatever is done to a page from outside, ``verify`` tells."""

    @pytest.fixture
    def guest(self, vm: VmRecord, job: Job) -> Iterator[QemuGuest]:
        job.ask("start 16 20000")
        before = job.writes()
        while job.writes() < before + 20000:
            pass
        with vm.attach() as guest:
            yield guest

    @staticmethod
    def find(guest: QemuGuest, number: int) -> list[int]:
        """Which of the guest's pages are page ``number`` of the working set: they hold its number and its checksum.

        One is; others are free by now, and were an earlier job's.
        """
        found = []
        weights = 2 * np.arange(511, dtype=np.uint64) + 1
        for first in range(0, guest.pages, 1024):
            data = bytearray(1024 * PAGE_SIZE)
            guest.memory.read_into(first, memoryview(data))
            words = np.frombuffer(data, np.uint64).reshape(-1, 512)
            candidates = np.flatnonzero((words[:, 0] == number) & (words[:, 1] > 0) & (words[:, 1] < 1000))
            for candidate in candidates:
                if (words[candidate, :511] * weights).sum(initial=SEED) == words[candidate, 511]:
                    found.append(int(first + candidate))
        assert found, f"page {number} of the working set is not in the guest's memory"
        return found

    @staticmethod
    def read(guest: QemuGuest, page: int) -> bytearray:
        content = bytearray(PAGE_SIZE)
        guest.memory.read_into(page, memoryview(content))
        return content

    def spoil(self, guest: QemuGuest, number: int, change: str) -> None:
        with paused(guest):
            pages = self.find(guest, number)
            data = self.read(guest, pages[0])
            if change == "zero":
                data = bytearray(PAGE_SIZE)
            elif change == "bit":
                data[2000] ^= 1
            elif change == "other":
                data = self.read(guest, self.find(guest, number + 1)[0])
            for page in pages:
                guest.memory.write(page, memoryview(data))

    @pytest.mark.parametrize(("change", "why"), [("zero", "checksum"), ("bit", "checksum"), ("other", "number")])
    def test_a_spoilt_page_is_found_for_good(self, guest: QemuGuest, job: Job, change: str, why: str) -> None:
        self.spoil(guest, 17, change)
        assert job.ask("verify") == f"bad 1 first=17 {why}"
        before = job.writes()
        while job.writes() < before + 20000:
            pass
        assert job.ask("verify").startswith("bad 1 first=17")

    def test_a_lost_update_is_found(self, guest: QemuGuest, job: Job) -> None:
        """The page comes back as it once was: whole, right, and old."""
        with paused(guest):
            old = {page: self.read(guest, page) for page in self.find(guest, 17)}
        changed: list[int] = []
        while not changed:
            changed = [page for page, content in old.items() if self.read(guest, page) != content]
        with paused(guest):
            guest.memory.write(changed[0], memoryview(old[changed[0]]))
        assert job.ask("verify") == "bad 1 first=17 counter"


def test_a_started_vm_can_be_told_by_name(vm: VmRecord) -> None:
    registry = Registry(Path(vm.directory).parent.parent)
    assert registry.get("web") == vm
    with pytest.raises(OutboardError):
        registry.get("cache")
