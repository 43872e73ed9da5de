"""QEMU's own migration, reduced to what only QEMU knows: the state of its devices.

With the capability ``x-ignore-shared`` QEMU leaves out memory that is shared, and what remains is half a megabyte that
goes over a unix socket. QEMU never listens on the network: its migration stream is the part of it that has had most
security reports, and the streams between hosts are authenticated and encrypted by us.

``pause-before-switchover`` gives the moment that a memory engine needs: the guest stopped, its devices drained, and
nothing saved yet. Source: QEMU's docs/devel/migration and qapi/migration.json.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from outboard.errors import OutboardError, RefusedError, UnreachableError
from outboard.vmm.guest import QemuGuest
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import VmRecord

_CAPABILITIES = ("events", "x-ignore-shared", "pause-before-switchover")
_UNLIMITED = 1 << 40
_CHUNK = 256 * 1024
_DEVICES = "devices.sock"


def _set_capabilities(monitor: Monitor, names: tuple[str, ...], state: bool) -> None:
    monitor.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": state} for name in names])


def _wait_status(monitor: Monitor, wanted: str, timeout: float) -> None:
    """Wait for the MIGRATION event of status ``wanted``.

    :raise OutboardError: QEMU's migration ended otherwise.
    """
    while True:
        status = monitor.wait_event({"MIGRATION"}, timeout)["data"]["status"]
        if status == wanted:
            return
        if status in {"failed", "cancelled", "completed"}:
            answer = monitor.execute("query-migrate")
            why = answer.get("error-desc", status) if isinstance(answer, dict) else status
            raise OutboardError(f"QEMU could not move its device state: waited for {wanted}, got {why}")


def _runs(monitor: Monitor) -> bool:
    answer = monitor.execute("query-status")
    return isinstance(answer, dict) and bool(answer.get("running"))


def runs(monitor: Monitor, name: str) -> bool:
    """Whether the guest ``name`` runs; False: somebody has paused it.

    :raise RefusedError: ``run-state``: it does neither.
    """
    status = monitor.execute("query-status")["status"]
    if status not in ("running", "paused"):
        raise RefusedError(
            "run-state", f"{name} neither runs nor is paused: its QEMU says {status}; only such a guest can be moved"
        )
    return bool(status == "running")


def awaits_state(record: VmRecord) -> bool:
    """Whether a VM has never run here: its QEMU waits for the state of one that comes."""
    try:
        with Monitor.connect(record.engine_socket) as monitor:
            return bool(monitor.execute("query-status")["status"] == "inmigrate")
    except UnreachableError:
        return False


def take_back(monitor: Monitor, timeout: float = 10.0, *, run: bool = True) -> None:
    """Have the guest be here again that was on its way out, also when whoever sent it has died.

    One that no migration has stopped is left as it is.

    :param run: let it run; it did before.
    :raise UnreachableError: the VMM has ended.
    """
    answer = monitor.execute("query-migrate")
    if not isinstance(answer, dict) or answer.get("status", "none") == "none":
        return
    monitor.execute("migrate_cancel")
    answer = monitor.execute("query-migrate")
    while isinstance(answer, dict) and answer.get("status") in ("cancelling", "pre-switchover", "device"):
        monitor.wait_event({"MIGRATION"}, timeout)
        answer = monitor.execute("query-migrate")
    # Cancelled before it had completed, QEMU runs the guest by itself; afterwards it waits for us.
    if run and not _runs(monitor):
        monitor.execute("cont")
    _set_capabilities(monitor, _CAPABILITIES, False)


class Departure:
    """Device state on its way out of the source's QEMU.

    :param directory: where the unix socket is made; this departure's own, and readable by root alone.
    :param running: the guest runs; False: somebody has paused it, and it stays so.

    Synchronization: :meth:`forward` runs in a thread of its own; all else in the one that owns the monitor.
    """

    def __init__(self, guest: QemuGuest, directory: Path, *, running: bool) -> None:
        self._guest = guest
        self._running = running
        self._path = directory / _DEVICES
        # An engine that was killed leaves its own.
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(self._path))
        self._path.chmod(0o600)
        self._listener.listen(1)
        self._started = False
        _set_capabilities(guest.monitor, _CAPABILITIES, True)
        guest.monitor.execute("migrate-set-parameters", **{"max-bandwidth": _UNLIMITED, "downtime-limit": 2000})

    def begin_pause(self) -> None:
        """Have QEMU stop the guest and hold before it saves anything.

        :raise OutboardError: somebody has paused the guest, or let it run, since the beginning.
        """
        guest = self._guest
        if runs(guest.monitor, guest.name) != self._running:
            done = "paused" if self._running else "let go on"
            raise OutboardError(f"{guest.name} was {done} by somebody while it was on its way; migrate it again")
        self._started = True
        self._guest.monitor.execute("migrate", uri=f"unix:{self._path}")

    def wait_paused(self, timeout: float) -> float:
        """Wait until the guest has stopped and its devices are drained.

        :return: when it stopped, in seconds of the wall clock as QEMU read it.
        """
        if not self._running:
            _wait_status(self._guest.monitor, "pre-switchover", timeout)
            return time.time()
        stop = self._guest.monitor.wait_event({"STOP"}, timeout)
        _wait_status(self._guest.monitor, "pre-switchover", timeout)
        moment = stop["timestamp"]
        return float(moment["seconds"] + moment["microseconds"] / 1e6)

    def save(self) -> None:
        """Let QEMU go on to save its devices."""
        self._guest.monitor.execute("migrate-continue", state="pre-switchover")

    def wait_saved(self, timeout: float) -> None:
        """Wait until QEMU has put all of the state into the socket."""
        _wait_status(self._guest.monitor, "completed", timeout)

    def forward(self, send: Callable[[memoryview], None]) -> None:
        """Hand the stream on until QEMU closes it; an empty view is its end."""
        self._listener.settimeout(30)
        stream, _ = self._listener.accept()
        buffer = bytearray(_CHUNK)
        with stream:
            while size := stream.recv_into(buffer):
                send(memoryview(buffer)[:size])
        send(memoryview(b""))

    def go_on(self, timeout: float = 10.0) -> float:
        """After :meth:`wait_saved`: the guest stays here and runs on, or is paused as before.

        :return: when it ran again, in seconds of the wall clock as QEMU read it.
        :raise UnreachableError: the VMM does not answer.
        """
        monitor = self._guest.monitor
        moment = time.time()
        if self._running:
            monitor.execute("cont")
            stamp = monitor.wait_event({"RESUME"}, timeout)["timestamp"]
            moment = float(stamp["seconds"] + stamp["microseconds"] / 1e6)
        self._started = False
        _set_capabilities(monitor, _CAPABILITIES, False)
        return moment

    def undo(self, timeout: float = 10.0) -> None:
        """Take everything back: the guest runs at the source as before, or is paused there.

        :raise UnreachableError: the VMM has ended.
        """
        if self._started:
            take_back(self._guest.monitor, timeout, run=self._running)
        else:
            _set_capabilities(self._guest.monitor, _CAPABILITIES, False)

    def close(self) -> None:
        """Remove the socket. Idempotent."""
        self._listener.close()
        self._path.unlink(missing_ok=True)


class Arrival:
    """Device state on its way into a QEMU that was started with ``-incoming defer``."""

    def __init__(self, guest: QemuGuest, directory: Path) -> None:
        self._guest = guest
        path = directory / f"arrival-{secrets.token_hex(4)}.sock"
        monitor = guest.monitor
        # In this state `stop` means: do not run when the state has been taken, but wait for `cont`.
        monitor.execute("stop")
        _set_capabilities(monitor, ("events", "x-ignore-shared"), True)
        monitor.execute("migrate-incoming", uri=f"unix:{path}")
        self._stream = socket.socket(socket.AF_UNIX)
        self._stream.connect(os.fspath(path))
        path.unlink(missing_ok=True)

    def feed(self, data: memoryview) -> None:
        """Hand QEMU the next part of the stream."""
        self._stream.sendall(data)

    def finish(self, timeout: float) -> None:
        """Say that the stream is complete, and wait until QEMU has taken it."""
        self._stream.close()
        _wait_status(self._guest.monitor, "completed", timeout)

    def resume(self, timeout: float) -> None:
        """Let the guest run."""
        self._guest.monitor.execute("cont")
        self._guest.monitor.wait_event({"RESUME"}, timeout)

    def announce(self) -> None:
        """Have each network device of the guest announce its address, five times within half a second."""
        monitor = self._guest.monitor
        monitor.execute("announce-self", initial=50, max=200, rounds=5, step=50)
        _set_capabilities(monitor, ("events", "x-ignore-shared"), False)

    def close(self) -> None:
        """Close the stream. Idempotent."""
        self._stream.close()
