"""What the agent tells systemd, heard at a socket like systemd's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.agent.service import notify, watchdog_s
from outboard.errors import KernelError
from tests.support.cluster import Cluster
from tests.support.requirements import require

UNIT = Path(__file__).parents[2] / "systemd" / "outboard-agent.service"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def test_what_is_said_is_heard(manager: socket.socket) -> None:
    notify("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"outboard-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("STOPPING=1")
        assert listening.recv(100) == b"STOPPING=1"


def test_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_manager_that_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with pytest.raises(KernelError, match=r"message to the service manager at .*gone"):
        notify("READY=1")


@pytest.mark.parametrize(
    ("allowed", "pid", "pause"),
    [("10000000", None, 5.0), ("10000000", "1", None), (None, None, None), ("soon", None, None)],
)
def test_how_often_to_say_so(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, pid: str | None, pause: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", allowed), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert watchdog_s() == pause


@pytest.mark.slow
def test_an_agent_says_that_it_is_up_and_alive_and_ends(manager: socket.socket) -> None:
    require("root")
    cluster = Cluster(51)
    host = cluster.a
    host.environment |= {"NOTIFY_SOCKET": os.environ["NOTIFY_SOCKET"], "WATCHDOG_USEC": "100000"}
    manager.settimeout(30)
    try:
        host.start_agent()
        assert [manager.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        host.stop_agent()
        heard = b""
        while heard != b"STOPPING=1":
            heard = manager.recv(100)
    finally:
        host.stop_agent()
        shutil.rmtree(cluster.root)


def test_the_unit_is_one() -> None:
    require("systemd")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNIT)], capture_output=True, text=True, check=False
    )
    # The program is not installed where the tests run.
    said = [line for line in done.stderr.splitlines() if "outboard is not executable" not in line]
    assert not [line for line in said if "outboard-agent.service" in line], done.stderr
