"""The monitor of a real QEMU that stands at its first instruction, and of none."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import UnreachableError
from outboard.linux import proc
from outboard.vmm.monitor import Monitor, MonitorError
from tests.support.machine import Machine
from tests.support.requirements import require


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    require("qemu")
    with Machine() as running:
        yield running


@pytest.fixture
def monitor(machine: Machine) -> Iterator[Monitor]:
    with Monitor.connect(machine.qmp) as connected:
        yield connected


def test_answers_a_command_and_knows_who_answers(monitor: Monitor, machine: Machine) -> None:
    assert monitor.execute("query-status")["status"] == "prelaunch"
    assert monitor.peer_pid == machine.pid
    assert "pc.ram" in monitor.human("info mtree") or "ram" in monitor.human("info mtree")


def test_passes_arguments(monitor: Monitor) -> None:
    assert monitor.execute("qom-get", path="/machine", property="type").endswith("-machine")


def test_tells_what_qemu_refused_and_goes_on(monitor: Monitor) -> None:
    with pytest.raises(MonitorError, match=r"no-such-command: QEMU says: .*no-such-command"):
        monitor.execute("no-such-command")
    assert monitor.execute("query-status")


def test_events_come_in_order_with_qemus_time_and_none_is_lost(monitor: Monitor) -> None:
    before = time.time()
    monitor.execute("cont")
    monitor.execute("stop")
    monitor.execute("cont")
    monitor.execute("stop")
    second = [monitor.wait_event({"STOP"}, 5), monitor.wait_event({"STOP"}, 5)]
    first = [monitor.wait_event({"RESUME"}, 5), monitor.wait_event({"RESUME"}, 5)]
    moments = [event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6 for event in first + second]
    assert moments[0] <= moments[2] <= moments[1] <= moments[3]
    assert before - 1 < moments[0] < time.time() + 1
    assert second[0]["data"] == {}


def test_no_event_is_an_error_after_the_timeout_and_the_monitor_remains(monitor: Monitor) -> None:
    with pytest.raises(UnreachableError, match=r"wait for MIGRATION: .* did not answer within 0.05 s"):
        monitor.wait_event({"MIGRATION"}, 0.05)
    monitor.execute("cont")
    monitor.execute("stop")
    assert monitor.wait_event({"STOP"}, 5)["event"] == "STOP"


def test_an_answer_that_is_late_is_dropped(machine: Machine, monitor: Monitor) -> None:
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        proc.wait_stopped(machine.pid)
        with pytest.raises(UnreachableError, match=r"query-name: .* did not answer within 0.05 s"):
            monitor.execute("query-name", timeout=0.05)
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    assert "status" in monitor.execute("query-status")


def test_somebody_else_has_it(machine: Machine, monitor: Monitor) -> None:
    with pytest.raises(UnreachableError, match="somebody else is connected to it"):
        Monitor.connect(machine.qmp, timeout=0.1)
    assert monitor.execute("query-status")


def test_it_can_be_had_again_after_close(machine: Machine) -> None:
    for _ in range(3):
        with Monitor.connect(machine.qmp) as monitor:
            assert monitor.execute("query-status")
        monitor.close()
        with pytest.raises(UnreachableError, match="has been closed"):
            monitor.execute("query-status")


def test_several_monitors_of_one_process() -> None:
    with Machine(16) as one, Machine(16) as other, Monitor.connect(one.qmp) as a, Monitor.connect(other.qmp) as b:
        a.execute("cont")
        b.execute("query-status")
        a.execute("stop")
        assert a.wait_event({"STOP"}, 5)
        assert a.execute("query-status")["status"] == "paused"
        assert b.execute("query-status")["status"] == "prelaunch"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"):
        Monitor.connect(tmp_path / "none.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(os.fspath(tmp_path / "stale.sock"))
    stale.close()
    with pytest.raises(UnreachableError, match="Connection refused"):
        Monitor.connect(tmp_path / "stale.sock")


def test_a_link_is_not_followed(machine: Machine, tmp_path: Path) -> None:
    link = tmp_path / "link.sock"
    link.symlink_to(machine.qmp)
    with pytest.raises(UnreachableError, match="symbolic link"):
        Monitor.connect(link)


@pytest.mark.parametrize("greeting", [b'{"QMP": 3}\n', b"hello\n", b"{}\n", b"\xff\xfe\n", b""])
def test_what_does_not_greet_as_qemu_does(tmp_path: Path, greeting: bytes) -> None:
    path = tmp_path / "odd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(UnreachableError, match=r"no answer from the monitor at .*odd\.sock"):
            Monitor.connect(path, timeout=1)
        thread.join()


@pytest.mark.parametrize("waiting", ["command", "event"])
def test_a_dead_qemu_is_an_error_at_once(waiting: str) -> None:
    with Machine(16) as doomed, Monitor.connect(doomed.qmp) as monitor:
        os.kill(doomed.pid, signal.SIGSTOP)
        proc.wait_stopped(doomed.pid)
        killer = threading.Timer(0.1, os.kill, (doomed.pid, signal.SIGKILL))
        killer.start()
        began = time.monotonic()
        with pytest.raises(UnreachableError, match="is gone"):
            monitor.execute("query-status") if waiting == "command" else monitor.wait_event({"STOP"}, 30)
        killer.join()
        for _ in range(2):
            with pytest.raises(UnreachableError, match="is gone"):
                monitor.execute("query-status")
            with pytest.raises(UnreachableError, match="is gone"):
                monitor.wait_event({"STOP"}, 30)
        assert time.monotonic() - began < 5


def test_qemu_dies_between_two_calls() -> None:
    with Machine(16) as doomed, Monitor.connect(doomed.qmp) as monitor:
        monitor.execute("cont")
        doomed.kill()
        with pytest.raises(UnreachableError, match="is gone"):
            monitor.execute("query-status")


def test_events_that_came_before_the_end_can_still_be_had() -> None:
    with Machine(16) as doomed, Monitor.connect(doomed.qmp) as monitor:
        monitor.execute("cont")
        monitor.execute("quit")
        assert monitor.wait_event({"RESUME"}, 5)["event"] == "RESUME"
        assert monitor.wait_event({"SHUTDOWN"}, 5)["data"]["reason"] == "host-qmp-quit"
        with pytest.raises(UnreachableError, match="is gone"):
            monitor.wait_event({"SHUTDOWN"}, 5)


def test_only_the_latest_events_are_kept(monitor: Monitor) -> None:
    for _ in range(600):
        monitor.execute("cont")
        monitor.execute("stop")
    assert len(monitor._client.inbox) == 1000
    assert monitor.wait_event({"RESUME"}, 5)
