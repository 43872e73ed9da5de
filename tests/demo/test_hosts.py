"""The testbed on the live kernel: it comes, it carries, it goes, and what a killed one left goes too."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.hosts import NETNS, LinkCounter, Namespace, Testbed, TestbedError, run, sweep
from tests.support.requirements import require


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root")


KILLED = """
import sys
from demo.hosts import Testbed
with Testbed() as bed:
    bed.a.popen(["sleep", "1000"])
    print(bed.name, flush=True)
    sys.stdin.read()
"""


def left(name: str) -> list[str]:
    return [path.name for path in NETNS.glob(f"{name}*")]


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie that its parent has yet to wait for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def exchange(listener: Namespace, address: str, caller: Namespace, size: int) -> int:
    """Send *size* bytes from one namespace to another; returns how many arrived."""
    with listener.call(lambda: socket.create_server((address, 0))) as server:
        port = server.getsockname()[1]
        with caller.call(lambda: socket.create_connection((address, port), timeout=5)) as out:
            accepted, _ = server.accept()
            with accepted:
                out.sendall(bytes(size))
                out.shutdown(socket.SHUT_WR)
                arrived = 0
                while data := accepted.recv(65536):
                    arrived += len(data)
                return arrived


def test_it_comes_and_goes() -> None:
    with Testbed() as bed:
        assert len(left(bed.name)) == 3
        sleeper = bed.b.popen(["sleep", "1000"])
        while sleeper.pid not in bed.b.pids():
            assert sleeper.poll() is None
        assert bed.directory.is_dir()
    assert left(bed.name) == []
    assert not bed.directory.exists()
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    bed.close()


def test_it_goes_when_its_user_fails() -> None:
    bed = Testbed()
    with pytest.raises(KeyboardInterrupt), bed:
        raise KeyboardInterrupt
    assert left(bed.name) == []


def test_the_link_carries_and_counts() -> None:
    with Testbed() as bed:
        counter = LinkCounter(bed.a)
        before = counter.sent()
        assert exchange(bed.b, "10.78.0.2", bed.a, 50_000) == 50_000
        assert 50_000 < counter.sent() - before < 60_000
        counter.close()
        counter.close()


@pytest.mark.parametrize("shape", ["1gbit", "10gbit", "unlimited"])
def test_the_link_is_shaped_at_both_ends(shape: str) -> None:
    with Testbed(shape) as bed:
        for host in (bed.a, bed.b):
            assert ("tbf" in run("tc", "-n", host.name, "qdisc", "show", "dev", "link0")) == (shape != "unlimited")


@pytest.mark.parametrize("role", ["a", "b"])
def test_the_client_reaches_the_guests_network_of_each_host(role: str) -> None:
    with Testbed() as bed:
        host = bed.a if role == "a" else bed.b
        run("ip", "-n", host.name, "addr", "add", "10.77.0.11/24", "dev", "guests")
        assert exchange(host, "10.77.0.11", bed.client, 1000) == 1000


def test_what_a_killed_testbed_left_is_swept_and_a_living_one_is_not() -> None:
    with Testbed() as alive:
        dead = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert dead.stdin is not None
        assert dead.stdout is not None
        name = dead.stdout.readline().decode().strip()
        deadline = time.monotonic() + 10
        while not (inside := Namespace(f"{name}-a", "a").pids()):
            assert time.monotonic() < deadline
        dead.kill()
        dead.wait()
        dead.stdin.close()
        dead.stdout.close()
        assert name in sweep()
        assert left(name) == []
        assert not any(runs(pid) for pid in inside)
        assert len(left(alive.name)) == 3


def test_a_command_that_fails_is_quoted() -> None:
    with pytest.raises(TestbedError, match=r"ip link show no-such exited 1: .*no-such"):
        run("ip", "link", "show", "no-such")


def test_what_is_called_inside_fails_outside() -> None:
    with Testbed() as bed, pytest.raises(ZeroDivisionError):
        bed.client.call(lambda: 1 // 0)
