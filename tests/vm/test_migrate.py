"""Real guests move between two hosts, by every method, and prove every page; whatever fails leaves one VM running."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest.build import Image
from outboard.linux import cgroup
from outboard.vmm.monitor import Monitor
from outboard.wire.pki import create_authority, issue_host
from tests.support.cluster import Cluster, Vm, summary_of, wait_for

pytestmark = pytest.mark.slow


def migrate(vm: Vm, source: str, target: str, *options: str) -> tuple[int, str, str]:
    done = vm.cluster.hosts[source].outboard("migrate", vm.name, target, "-o", "ndjson", *options)
    return done.returncode, done.stdout, done.stderr


def only_at(vm: Vm, host: str) -> None:
    """Exactly one host has the VM, and it runs there."""
    for name, each in vm.cluster.hosts.items():
        assert each.has(vm.name) == (name == host), f"host {name}: {each.log()[-2000:]}"
    with vm.record(host).attach() as guest:
        assert guest.monitor.execute("query-status")["running"]


@pytest.mark.parametrize("method", ["enlightened", "post-copy", "pre-copy", "hybrid"])
def test_a_writing_guest_moves_and_nothing_is_lost(vm: Vm, method: str) -> None:
    code, output, errors = migrate(vm, "a", "b", f"--{method}", "--max-downtime", "1s")
    assert code == 0, errors + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    summary = summary_of(output)
    assert summary["state"] == "completed"
    assert summary["safe_at"] == "destination"
    only_at(vm, "b")
    vm.verify("b")
    if method in ("post-copy", "enlightened"):
        again = summary["resent_pages"]
        sent = summary["data_pages"] + summary["zero_pages"] + summary["urgent_pages"]
        assert sent <= summary["pages"] - summary["never_sent_pages"] + again, "a page crossed twice without cause"
    if method == "enlightened":
        assert summary["hints"].startswith("guest agent"), summary["hints"]
        assert summary["never_sent_pages"] > 0
    if method == "pre-copy":
        assert not summary["remote_faults"]
        # All went in rounds, and not in the pause.
        assert summary["rounds"][-1]["dirty_pages"] < summary["rounds"][0]["sent_pages"] // 4
        assert summary["blackout_ms"] < 2000


def test_there_and_back_again_with_every_page_compared(vm: Vm) -> None:
    for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
        code, output, errors = migrate(vm, source, target, "--verify")
        assert code == 0, errors
        assert summary_of(output)["verified"] is True
        only_at(vm, target)
        vm.verify(target)


def test_detached_and_followed_in_the_history(vm: Vm) -> None:
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "--detach", "-o", "json")
    assert done.returncode == 0, done.stderr
    migration = json.loads(done.stdout)["migration"]

    def kept() -> bool:
        lines = vm.cluster.a.outboard("history", vm.name, "-o", "ndjson").stdout.splitlines()
        return any(json.loads(line)["migration"] == migration for line in lines)

    wait_for(kept, "the history's entry")
    only_at(vm, "b")


def begun(vm: Vm, *options: str) -> Iterator[str]:
    process = vm.cluster.a.popen("migrate", vm.name, "b", "-o", "ndjson", *options)
    assert process.stdout is not None
    assert process.stderr is not None
    yield from process.stdout
    yield f"exit {process.wait()} {process.stderr.read()}"
    process.stdout.close()
    process.stderr.close()


def disturbed(vm: Vm, state: str, disturb: Callable[[], object], *options: str) -> str:
    """Begin a migration, disturb it once it is in ``state``; its exit code and words."""
    last = ""
    for line in begun(vm, *options):
        last = line
        if disturb is not None and f'"state":"{state}"' in line and "progress" in line:
            disturb()
            disturb = lambda: None  # noqa: E731  # once
    return last


SLOW = ("--pre-copy", "--max-bandwidth", "10MB", "--no-hints")


def test_cancel_leaves_the_vm_running_at_the_source(vm: Vm) -> None:
    said = disturbed(vm, "copying", lambda: vm.cluster.a.outboard("cancel", vm.name), *SLOW)
    assert said.startswith("exit 5"), said
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    only_at(vm, "a")
    vm.verify("a")
    code, _, errors = migrate(vm, "a", "b")
    assert code == 0, errors
    vm.verify("b")


def test_a_limit_that_changes_lets_it_finish(vm: Vm) -> None:
    said = disturbed(vm, "copying", lambda: vm.cluster.a.outboard("limit", vm.name, "none"), *SLOW)
    assert said.startswith("exit 0"), said
    only_at(vm, "b")
    vm.verify("b")


def test_a_migration_in_rounds_is_told_to_switch_over_now(vm: Vm) -> None:
    done = vm.cluster.a.outboard("switch", vm.name)
    assert done.returncode == 3, done.stderr
    hybrid = ("--hybrid", *SLOW[1:])
    said = disturbed(vm, "copying", lambda: vm.cluster.a.outboard("switch", vm.name), *hybrid)
    assert said.startswith("exit 0"), said
    only_at(vm, "b")
    vm.verify("b")
    summary = json.loads(vm.cluster.a.outboard("history", vm.name, "-o", "ndjson").stdout.splitlines()[-1])
    assert summary["remote_faults"] > 0


def test_rounds_end_when_their_time_is_over(vm: Vm) -> None:
    code, output, errors = migrate(vm, "a", "b", "--pre-copy", "--max-bandwidth", "12MB", "--timeout", "2s")
    assert code == 0, errors + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    summary = summary_of(output)
    assert not summary["remote_faults"]
    assert not summary["throttle"]
    # It stood still until all was there.
    assert summary["blackout_ms"] > 300
    only_at(vm, "b")
    vm.verify("b")


TOO_FAST = ("--pre-copy", "--max-bandwidth", "12MB", "--no-hints", "--max-downtime", "300ms")
"""The guest writes 20 MB/s."""


def test_a_guest_that_writes_too_fast_is_held_back_until_the_switch(vm: Vm) -> None:
    home = cgroup.names(vm.record("a").pid)
    code, output, errors = migrate(vm, "a", "b", *TOO_FAST)
    assert code == 0, errors + vm.cluster.a.log()[-2000:]
    summary = summary_of(output)
    assert summary["throttle"], output
    first, last = summary["throttle"][0], summary["throttle"][-1]
    assert first["who"] == "vCPU 0"
    assert first["share"] < 0.7
    assert last["share"] == 1
    assert "held to" in output
    said = vm.cluster.a.outboard("explain", vm.name)
    assert said.returncode == 0, said.stderr
    assert "It converged" in said.stdout
    assert "processor time" in said.stdout
    only_at(vm, "b")
    assert cgroup.names(vm.record("b").pid) == home
    vm.verify("b")
    refused = vm.cluster.a.outboard("explain", "nobody")
    assert (refused.returncode, "outboard history" in refused.stderr) == (3, True)


def test_a_killed_engine_holds_nobody_back(vm: Vm) -> None:
    pid = vm.record("a").pid
    home = cgroup.names(pid)
    said = ""
    for line in begun(vm, *TOO_FAST, "--max-downtime", "60ms"):
        said = line
        if "held to" in line and cgroup.names(pid) != home:
            os.kill(vm.cluster.a.engine(), signal.SIGKILL)
    assert said.startswith("exit 1"), said
    wait_for(lambda: cgroup.names(pid) == home, "the agent to let go")
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    only_at(vm, "a")
    vm.verify("a")


def test_the_destinations_qemu_dies_before_the_switch(vm: Vm) -> None:
    def kill() -> None:
        os.kill(vm.record("b").pid, signal.SIGKILL)

    said = disturbed(vm, "copying", kill, *SLOW)
    assert said.startswith("exit 1"), said
    only_at(vm, "a")
    vm.verify("a")


def test_the_sources_qemu_dies_before_the_switch(vm: Vm) -> None:
    def kill() -> None:
        os.kill(vm.record("a").pid, signal.SIGKILL)

    said = disturbed(vm, "copying", kill, *SLOW)
    assert said.startswith(("exit 1", "exit 8")), said
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")


def test_wrong_uses_are_told_apart(vm: Vm) -> None:
    host = vm.cluster.a
    assert migrate(vm, "a", "nowhere")[0] == 3
    assert host.outboard("migrate", "no-such-vm", "b").returncode == 3
    assert host.outboard("migrate", vm.name).returncode == 2
    assert host.outboard("migrate", vm.name, "b", "--max-bandwidth", "fast").returncode == 2
    assert host.outboard("cancel", "no-such-vm").returncode == 3
    only_at(vm, "a")


def test_a_name_that_is_taken_at_the_destination(vm: Vm) -> None:
    started = vm.cluster.b.outboard("run", str(vm.cluster.root / f"{vm.name}.toml"))
    assert started.returncode == 0, started.stderr
    pid = vm.record("b").pid
    code, _, errors = migrate(vm, "a", "b")
    assert code == 4, errors
    assert "runs on this host already" in errors
    assert vm.record("b").pid == pid
    assert vm.record("b").alive
    assert vm.cluster.b.outboard("stop", vm.name).returncode == 0
    only_at(vm, "a")
    vm.verify("a")


def test_an_agent_that_is_not_there(vm: Vm) -> None:
    code, output, errors = migrate(vm, "a", "silent")
    assert code == 8, errors
    assert summary_of(output)["safe_at"] == "source"
    only_at(vm, "a")
    vm.verify("a")


def test_no_agent_here(cluster: Cluster, tmp_path: Path) -> None:
    elsewhere = cluster.a.environment | {"OUTBOARD_RUNTIME_DIR": str(tmp_path)}
    command = cluster.a.command("migrate", "web", "b")
    done = subprocess.run(command, env=elsewhere, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 8
    assert "outboard agent" in done.stderr


def test_a_host_of_another_cluster_is_not_let_in(vm: Vm, tmp_path: Path) -> None:
    identity = Path(vm.cluster.a.environment["OUTBOARD_CONFIG_DIR"]) / "pki"
    kept = tmp_path / "kept"
    shutil.copytree(identity, kept)
    create_authority(tmp_path / "other")
    shutil.rmtree(identity)
    issue_host(tmp_path / "other", identity, "a", ["127.0.0.11"])
    try:
        code, _, errors = migrate(vm, "a", "b")
        assert code == 7, errors
        only_at(vm, "a")
    finally:
        shutil.rmtree(identity)
        shutil.copytree(kept, identity)


class LyingAgent:
    """Takes the guest agent's place on its socket and answers as ``answer`` says."""

    def __init__(self, path: Path, answer: Callable[[dict[str, object]], bytes | None]) -> None:
        self._true = path.rename(path.with_suffix(".true"))
        self._path = path
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line.lstrip(b"\xff"))
                if request["execute"] == "guest-sync-delimited":
                    connection.sendall(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                    continue
                answer = self._answer(request)
                if answer is not None:
                    try:
                        connection.sendall(answer)
                    except OSError:
                        return

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_exc: object) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)
        if self._true.exists():
            self._true.rename(self._path)
        self._thread.join(10)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda _: b"\x00\x01garbage\n", id="garbage"),
        pytest.param(lambda _: b'{"return": {"buf-b64": "!!!"}}\n', id="no-base64"),
        pytest.param(lambda _: b"x" * (5 << 20), id="endless"),
        pytest.param(lambda _: None, id="hangs"),
    ],
)
def test_a_guest_agent_that_lies_costs_its_hints(vm: Vm, answer: Callable[[dict[str, object]], bytes | None]) -> None:
    path = vm.record("a").agent_socket
    assert path is not None
    with LyingAgent(path, answer):
        code, output, errors = migrate(vm, "a", "b")
    assert code == 0, errors
    assert "none" in summary_of(output)["hints"]
    only_at(vm, "b")
    vm.verify("b")


def test_a_guest_that_calls_every_page_free_harms_itself_alone(vm: Vm) -> None:
    free = b64encode((1 << 10).to_bytes(8, "little") * 32768).decode()

    def answer(request: dict[str, object]) -> bytes:
        result: object = {"count": 262144, "buf-b64": free, "eof": False}
        if request["execute"] == "guest-file-open":
            result = 1
        return json.dumps({"return": result}).encode() + b"\n"

    path = vm.record("a").agent_socket
    assert path is not None
    with LyingAgent(path, answer):
        code, output, _ = migrate(vm, "a", "b")
    assert code == 0
    assert summary_of(output)["state"] == "completed"
    assert vm.cluster.b.has(vm.name)
    assert not vm.cluster.a.has(vm.name)


def test_nothing_is_evicted_from_a_vm_on_its_way(vm: Vm) -> None:
    refused = []

    def evict() -> None:
        refused.append(vm.cluster.a.outboard("evict", vm.name, "--idle", "0"))
        vm.cluster.a.outboard("cancel", vm.name)

    said = disturbed(vm, "copying", evict, *SLOW)
    assert said.startswith("exit 5"), said
    assert refused[0].returncode == 4
    assert "is being migrated" in refused[0].stderr
    assert not vm.record("a").memory_directory.exists()
    vm.verify("a")


def test_an_engine_killed_before_the_switch_is_forgotten(vm: Vm) -> None:
    def kill() -> None:
        os.kill(vm.cluster.a.engine(), signal.SIGKILL)

    said = disturbed(vm, "copying", kill, *SLOW)
    assert not said.startswith("exit 0"), said
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    vm.verify("a")
    assert vm.cluster.a.outboard("attach", vm.name).returncode == 0
    code, _, errors = migrate(vm, "a", "b", "--verify")
    assert code == 0, errors
    only_at(vm, "b")
    vm.verify("b")


def test_a_guest_without_an_agent_goes_by_what_it_touches(cluster: Cluster, image: Image) -> None:
    vm = Vm(cluster, image, "mute", guest_agent=False)
    try:
        code, output, errors = migrate(vm, "a", "b", "--verify")
        assert code == 0, errors + vm.cluster.a.log()[-2000:]
        summary = summary_of(output)
        assert summary["verified"] is True
        assert re.fullmatch(r"no guest agent; accesses: [1-9]\d* pages touched in \d+ ms", summary["hints"])
        only_at(vm, "b")
    finally:
        for host in cluster.hosts.values():
            if host.has(vm.name):
                host.outboard("stop", vm.name)


def paused(vm: Vm, host: str) -> bool:
    with vm.record(host).attach() as guest:
        return bool(guest.monitor.execute("query-status")["status"] in ("paused", "postmigrate"))


def pause(vm: Vm, host: str, command: str = "stop") -> None:
    with Monitor.connect(vm.record(host).qmp_socket, timeout=30) as monitor:
        monitor.execute(command)


def test_a_paused_vm_moves_and_stays_paused(vm: Vm) -> None:
    pause(vm, "a")
    code, output, errors = migrate(vm, "a", "b")
    assert code == 0, errors
    assert summary_of(output)["state"] == "completed"
    assert not vm.cluster.a.has(vm.name)
    assert paused(vm, "b")
    pause(vm, "b", "cont")
    vm.verify("b")


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_a_paused_vm_that_does_not_move_stays_paused(vm: Vm, how: str) -> None:
    pause(vm, "a")
    undo = {
        "cancel": lambda: vm.cluster.a.outboard("cancel", vm.name),
        "kill": lambda: os.kill(vm.cluster.a.engine(), signal.SIGKILL),
    }
    said = disturbed(vm, "switching", undo[how], "--verify", "--max-bandwidth", "20MB")
    assert said.startswith(("exit 5", "exit 1")), said
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    wait_for(lambda: not (vm.record("a").directory / "departing").exists(), "the agent's taking back")
    assert paused(vm, "a")
    pause(vm, "a", "cont")
    vm.verify("a")


def test_a_vm_that_is_paused_on_its_way_stays_where_it_is(vm: Vm) -> None:
    def stop_and_hurry() -> None:
        pause(vm, "a")
        vm.cluster.a.outboard("limit", vm.name, "none")

    said = disturbed(vm, "copying", stop_and_hurry, *SLOW)
    assert said.startswith("exit 1"), said
    assert "was paused by somebody" in said
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    assert paused(vm, "a")
    pause(vm, "a", "cont")
    vm.verify("a")
