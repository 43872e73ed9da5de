"""script/bench snapshot: a VM is saved while it writes and restored, beside QEMU's own savevm and background-snapshot.

One guest of 1 GiB: memcached with 100 MiB, 10,000 pages written a second, and memory that was used and freed. What a
snapshot costs it is the longest gap that it sees between two ticks of 20 ms, and the time that it stood still, in
which its clock does too; beside it the longest gap of as long a time without one, which is what the machine costs it.
What a restoration costs is the time from the order until memcached has answered for a key.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
from rich.console import Console

from guest.build import COMMAND_LINE, build
from outboard.agent.orders import Release, Snapshot, ask, ask_snapshot
from outboard.errors import OutboardError
from outboard.pages import PAGE_SIZE
from outboard.vmm.launch import launch, stop
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import VmRecord
from outboard.vmm.spec import Boot, VmSpec
from tests.support.cluster import Cluster, Host

from .claims import Claim, claim, publish

_PORT = 21211
_KEYS, _VALUE = 25_000, 4_000
_PATIENCE_S = 300.0
_ATTEMPT_S = 0.02
_ATTEMPTS = 200


def _first_answer(port: int, question: bytes, end: bytes) -> bytes:
    """Ask once more every 20 ms until an answer is complete: who connects before the guest runs is not heard."""
    deadline = time.monotonic() + _PATIENCE_S
    asking: dict[int, tuple[socket.socket, bytearray]] = {}
    poll = select.poll()
    try:
        while time.monotonic() < deadline:
            if len(asking) < _ATTEMPTS:
                with contextlib.suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
                    one.sendall(question)
                    asking[one.fileno()] = one, bytearray()
                    poll.register(one, select.POLLIN)
            until = time.monotonic() + _ATTEMPT_S
            while (left := until - time.monotonic()) > 0:
                for fd, _ in poll.poll(left * 1e3):
                    one, got = asking[fd]
                    data = b""
                    with contextlib.suppress(OSError):
                        data = one.recv(1 << 16)
                    if not data:
                        del asking[fd]
                        poll.unregister(fd)
                        one.close()
                    got += data
                    if got.endswith(end):
                        return bytes(got)
        raise OutboardError(f"nobody answered on port {port} within {_PATIENCE_S:.0f} s")
    finally:
        for one, _ in asking.values():
            one.close()


def _answer(port: int, question: bytes, end: bytes) -> bytes:
    """Ask a guest that runs."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as one:
        one.sendall(question)
        while not got.endswith(end):
            data = one.recv(1 << 16)
            if not data:
                raise OutboardError(f"the guest hung up after {got!r}")
            got += data
    return got


def _tell(line: str) -> str:
    """An order to the guest's writer."""
    return _answer(_PORT + 1, line.encode() + b"\n", b"\n").decode().strip()


def _gap_ms() -> float:
    return float(_tell("stats").partition("gap_ms=")[2])


def _get(key: int, ask: Callable[[int, bytes, bytes], bytes] = _answer) -> None:
    said = ask(_PORT, b"get k%08d\r\n" % key, b"END\r\n")
    if len(said) < _VALUE:
        raise OutboardError(f"memcached lost a key: it said {said[:60]!r}")


def _fill() -> None:
    with socket.create_connection(("127.0.0.1", _PORT)) as one:
        for key in range(_KEYS):
            value = key.to_bytes(4, "little") * (_VALUE // 4)
            one.sendall(b"set k%08d 0 0 %d noreply\r\n" % (key, _VALUE) + value + b"\r\n")
        one.sendall(b"version\r\n")
        one.recv(100)


class Scene:
    """A host with an agent, and the description of the guest."""

    def __init__(self, host: Host, directory: Path, mebibytes: int) -> None:
        self.host, self.directory = host, directory
        self.state = directory / "state.qcow2"
        self.background = directory / "background"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.state, "8G"], check=True)
        files = build(Path(__file__).parent.parent / ".build" / "guest")
        forward = ",".join(
            f"hostfwd=tcp:127.0.0.1:{_PORT + index}-10.0.2.15:{port}" for index, port in enumerate((11211, 7000))
        )
        network = ["-netdev", f"user,id=user,restrict=on,{forward}", "-device", "virtio-net-pci,netdev=user,romfile="]
        self.spec = VmSpec(
            name="web",
            memory=f"{mebibytes}MiB",
            accel="auto",
            boot=Boot(str(files.kernel), str(files.initrd), f"{COMMAND_LINE} ip=10.0.2.15"),
            # Where savevm puts what it saves.
            extra_args=[*network, "-drive", f"file={self.state},if=none,id=state"],
        )

    def start(self, *more: str) -> VmRecord:
        spec = msgspec.structs.replace(self.spec, extra_args=[*self.spec.extra_args, *more])
        return launch(spec, self.host.registry)

    def stop(self) -> None:
        stop(self.host.registry.get("web"), self.host.registry)

    def call(self, path: str, method: str, body: Any = None) -> Any:
        transport = httpx.HTTPTransport(uds=str(self.host.runtime / "agent.sock"))
        with httpx.Client(transport=transport, base_url="http://agent", timeout=_PATIENCE_S) as client:
            response = client.request(method, path, json=body)
            if response.is_error:
                raise OutboardError(response.text + self.host.log()[-2000:])
            return response.json()


def _human(record: VmRecord, line: str) -> None:
    with Monitor.connect(record.engine_socket) as monitor:
        said = monitor.human(line, _PATIENCE_S)
    if said.strip():
        raise OutboardError(f"{line}: {said}")


def _ours(scene: Scene, record: VmRecord) -> tuple[str, dict[str, float]]:
    control = Path(scene.call("/v1/engines/web", "PUT")["control"])
    _tell("reset")
    taken = ask_snapshot(control, Snapshot())
    gap = _gap_ms()
    _tell("reset")
    time.sleep(taken.seconds)
    otherwise = _gap_ms()
    ask(control, Release())
    del record
    return taken.id, {
        "stall": max(gap, 20.0) - 20.0 + taken.pause_ms,
        "pause": taken.pause_ms,
        "gap": gap,
        "gap_otherwise": otherwise,
        "seconds": taken.seconds,
        "file": taken.file / 1e6,
        "waited": float(taken.waited),
    }


def _savevm(scene: Scene, record: VmRecord) -> dict[str, float]:
    began = time.monotonic()
    _human(record, "savevm bench")
    seconds = time.monotonic() - began
    # The guest stands still from beginning to end.
    return {"stall": seconds * 1e3, "seconds": seconds, "file": scene.state.stat().st_blocks * 512 / 1e6}


def _background(scene: Scene, record: VmRecord) -> dict[str, float]:
    """QEMU's own, which holds back writers by a userfaultfd as we do."""
    scene.background.unlink(missing_ok=True)
    capabilities = [{"capability": "background-snapshot", "state": True}, {"capability": "events", "state": True}]
    with Monitor.connect(record.engine_socket) as monitor:
        monitor.execute("migrate-set-capabilities", capabilities=capabilities)
        monitor.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        _tell("reset")
        began = time.monotonic()
        monitor.execute("migrate", uri=f"exec:cat > {scene.background}")
        stamps: dict[str, float] = {}
        while True:
            event = monitor.wait_event({"STOP", "RESUME", "MIGRATION"}, _PATIENCE_S)
            stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
            if event["event"] != "MIGRATION":
                stamps.setdefault(event["event"], stamp)
            elif event["data"]["status"] in ("completed", "failed"):
                break
        seconds = time.monotonic() - began
        if event["data"]["status"] == "failed":
            raise OutboardError(f"background-snapshot: {monitor.execute('query-migrate')}")
        for one in capabilities:
            one["state"] = False
        monitor.execute("migrate-set-capabilities", capabilities=capabilities)
    pause = (stamps["RESUME"] - stamps["STOP"]) * 1e3 if len(stamps) == 2 else 0.0
    size = scene.background.stat().st_size / 1e6
    return {"stall": max(_gap_ms(), 20.0) - 20.0 + pause, "pause": pause, "seconds": seconds, "file": size}


@contextlib.contextmanager
def _timed(
    found: dict[str, list[float]], name: str, scene: Scene, after: Callable[[], None] = lambda: None
) -> Iterator[None]:
    began = time.monotonic()
    yield
    _get(4711, _first_answer)
    found.setdefault(name, []).append(time.monotonic() - began)
    after()
    if not _tell("verify").startswith("ok"):
        raise OutboardError(f"{name}: the guest lost writes")
    for key in range(0, _KEYS, _KEYS // 50):
        _get(key)
    scene.stop()


def _restore(scene: Scene, snapshot: str, eager: bool) -> None:
    scene.call("/v1/restores", "POST", {"vm": "web", "snapshot": snapshot, "eager": eager})


def _restorations(scene: Scene, snapshot: str, found: dict[str, list[float]]) -> dict[str, float]:
    """How long each takes to its first answer, in seconds; and the faults of the first of ours."""
    faults: dict[str, float] = {}
    order = scene.host.directory / "state" / "snapshots" / f"{snapshot}.order"
    order.unlink(missing_ok=True)
    with _timed(found, "lazy", scene):
        _restore(scene, snapshot, False)
    with _timed(found, "again", scene, lambda: faults.update(_faults(scene))):
        _restore(scene, snapshot, False)
    with _timed(found, "eager", scene):
        _restore(scene, snapshot, True)
    with _timed(found, "loadvm", scene):
        scene.start("-loadvm", "bench")
    if scene.background.exists():
        with _timed(found, "background", scene):
            scene.start("-incoming", f"exec:cat {scene.background}")
    return faults


def _faults(scene: Scene) -> dict[str, float]:
    done = scene.host.outboard("residency", "web", "-o", "json")
    looked = msgspec.json.decode(done.stdout)
    return {"faults": looked["faults"], "p50": looked["fault_p50_us"] or 0.0, "p99": looked["fault_p99_us"] or 0.0}


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the claims here.")
@click.option("--runs", default=3, show_default=True)
@click.option("--mebibytes", default=1024, show_default=True, help="Memory of the guest.")
def main(file: Path | None, runs: int, mebibytes: int) -> None:
    """Measure snapshots and restorations beside QEMU's own."""
    taken: dict[str, list[dict[str, float]]] = {}
    restored: dict[str, list[float]] = {}
    faults: list[dict[str, float]] = []
    with Cluster(31) as cluster:
        scene = Scene(cluster.a, cluster.root, mebibytes)
        for _ in range(runs):
            record = scene.start()
            _first_answer(_PORT, b"version\r\n", b"\r\n")
            _first_answer(_PORT + 1, b"stats\n", b"\n")
            _fill()
            _tell(f"churn {mebibytes // 4}")
            _tell(f"start {mebibytes // 8} 10000")
            snapshot, ours = _ours(scene, record)
            taken.setdefault("ours", []).append(ours)
            with contextlib.suppress(OutboardError):
                taken.setdefault("background", []).append(_background(scene, record))
            taken.setdefault("savevm", []).append(_savevm(scene, record))
            scene.stop()
            faults.append(_restorations(scene, snapshot, restored))
            subprocess.run(["qemu-img", "snapshot", "-d", "bench", scene.state], check=True)
            for path in (cluster.a.directory / "state" / "snapshots").iterdir():
                path.unlink()
    console = Console()
    console.print_json(data={"taken": taken, "restored": restored, "faults": faults})
    claims = _claims(taken, restored, faults, runs)
    publish(claims, file, console)
    console.print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, pages of {PAGE_SIZE} bytes")
    sys.exit(0 if all(each.met for each in claims) else 1)


def _claims(
    taken: dict[str, list[dict[str, float]]],
    restored: dict[str, list[float]],
    faults: list[dict[str, float]],
    runs: int,
) -> list[Claim]:
    def of(arm: str, what: str) -> list[float]:
        return [one[what] for one in taken.get(arm, [])]

    def one(name: str, values: list[float], bar: float, unit: str) -> Claim:
        return claim(name, statistics.median(values), bar, unit, runs, spread=(min(values), max(values)))

    def beside(name: str, values: list[float], peer: list[float], bar: float, unit: str, against: str) -> Claim:
        return claim(
            name,
            statistics.median(values),
            bar,
            unit,
            runs,
            peer=statistics.median(peer) if peer else None,
            against=against,
            spread=(min(values), max(values)),
        )

    found = [
        one("longest stall at 10,000 writes/s", of("ours", "stall"), 50, "ms"),
        beside("longest stall", of("ours", "stall"), of("savevm", "stall"), 1.0, "ms", "savevm"),
        beside("size", of("ours", "file"), of("savevm", "file"), 1.0, "MB", "savevm"),
    ]
    if taken.get("background"):
        against = "background-snapshot"
        found.append(beside("longest stall", of("ours", "stall"), of("background", "stall"), 1.0, "ms", against))
        found.append(beside("time", of("ours", "seconds"), of("background", "seconds"), 1.0, "s", against))
    lazy = restored["lazy"]
    peers: list[tuple[str, str, float]] = [("eager", "eager restore", 0.3), ("loadvm", "loadvm", 0.5)]
    peers += [("background", "QEMU -incoming", 0.5)] if restored.get("background") else []
    found += [beside("first answer", lazy, restored[arm], bar, "s", name) for arm, name, bar in peers]
    found.append(beside("first answer, order known", restored["again"], restored["eager"], 0.3, "s", "eager restore"))
    found.append(one("fault, p50", [each["p50"] for each in faults], 200, "us"))
    return found


if __name__ == "__main__":
    main()
