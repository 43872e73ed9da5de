"""Snapshots of a managed guest: taken in a thread of its engine, and what a successor must know of a broken one.

``snapshotting`` in the guest's directory is there while the guest stands still for a snapshot; in it whether it ran. A
successor lets it run again. What a snapshot has protected a successor's pager lifts, as it lifts everything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import structlog

from outboard.agent.orders import Failed, Snapped, Snapshot
from outboard.errors import OutboardError
from outboard.linux import sched
from outboard.pager.on_disk import OnDisk
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.snapshot import catalog
from outboard.snapshot.live import Live, Taken
from outboard.stores.snapshot_format import Kind
from outboard.vmm.device_state import take_back
from outboard.vmm.disks import described
from outboard.vmm.guest import QemuGuest
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_spec

_MARK = "snapshotting"
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Vm:
    """What an engine knows of a VM besides its memory: where it is recorded, and where its snapshots go."""

    name: str
    registry: Registry
    snapshots: Path

    def attach(self) -> QemuGuest:
        """To its monitor, though its memory is managed."""
        return self.registry.get(self.name).attach(managed=True)


class Snapshotting:
    """A snapshot that is being taken; its client hears of its end by :meth:`answer`.

    Synchronization: a thread of its own takes it; all else in the engine's.
    """

    def __init__(
        self, vm: Vm, pager: Pager, on_disk: OnDisk | None, directory: Path, order: Snapshot, client: Connection
    ) -> None:
        self.client, self.order = client, order
        self._vm, self._pager, self._on_disk, self._directory = vm, pager, on_disk, directory
        self.outcome: Snapped | Failed | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # It computes, and the guest's processors are to have what it would take from them.
        sched.favour_no_more([threading.get_native_id()])
        try:
            taken = self._take()
            log.info("snapshot", vm=self._vm.name, id=taken.contents.meta.id, pause_ms=round(taken.pause_ms, 1))
            self.outcome = _told(taken)
        except OutboardError as error:
            log.error("snapshot", vm=self._vm.name, why=str(error))
            self.outcome = Failed(why=str(error), exit_code=error.exit_code)
        except Exception as error:
            self.outcome = Failed(why=f"no snapshot of {self._vm.name} was taken: {error!r}", exit_code=1)
            raise

    def _take(self) -> Taken:
        vm = self._vm
        record = vm.registry.get(vm.name)
        parent = catalog.latest(vm.snapshots, vm.name) if self.order.incremental else None
        with vm.attach() as guest:
            return Live(
                guest,
                self._pager,
                parse_spec(record.spec_text(), f"the description of {vm.name}"),
                vm.snapshots,
                self._directory,
                parent=parent,
                on_disk=self._on_disk if self.order.blocks else None,
                describe=lambda spec: vm.registry.describe(vm.name, spec.to_toml()),
                paused=_marker(self._directory),
            ).take()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over."""
        self._thread.join()


def _marker(directory: Path) -> Callable[[bool | None], None]:
    """What keeps, or removes, the mark of a guest that stands still."""

    def mark(running: bool | None) -> None:
        path = directory / _MARK
        if running is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(msgspec.json.encode(running))

    return mark


def mend(vm: Vm, directory: Path) -> None:
    """Have a guest go on that stood still for a snapshot whose engine has died.

    :raise UnreachableError: its VMM does not answer.
    """
    try:
        running = msgspec.json.decode((directory / _MARK).read_bytes() or b"true", type=bool)
    except FileNotFoundError:
        return
    record = vm.registry.get(vm.name)
    with Monitor.connect(record.engine_socket) as monitor:
        take_back(monitor, run=running)
        spec = parse_spec(record.spec_text(), f"the description of {vm.name}")
        vm.registry.describe(vm.name, described(monitor, spec).to_toml())
    with contextlib.suppress(FileNotFoundError):
        (directory / _MARK).unlink()
    log.warning("a snapshot was broken off", vm=vm.name)


def _told(taken: Taken) -> Snapped:
    contents, meta = taken.contents, taken.contents.meta
    kinds = contents.table.kinds
    counts = [int((kinds == kind).sum()) * PAGE_SIZE for kind in Kind]
    return Snapped(
        id=meta.id,
        vm=meta.vm,
        parent=None if meta.parent is None else meta.parent.id,
        memory=kinds.size * PAGE_SIZE,
        zero=counts[Kind.ZERO],
        new=int(contents.chunks.pages.sum()) * PAGE_SIZE,
        referred=counts[Kind.PARENT] + counts[Kind.DISK],
        file=contents.size,
        seconds=taken.seconds,
        pause_ms=taken.pause_ms,
        waited=taken.by_faults,
    )
