"""A snapshot of a VM while it runs.

::

    write-protect the memory, in pieces, while the guest runs
    ┌ QEMU stops the guest                     what was written meanwhile is protected again;
    │ each disk that it writes to gets an      nothing is copied here
    │   overlay; QEMU saves its devices
    │ the instant
    └ the guest runs on
    save the pages: those that the guest writes to just before it does, all others in order

The guest stands still for as long as QEMU takes to save its devices. Whoever writes to a page that is not saved yet
waits for that page alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, OutboardError, RefusedError
from outboard.linux import sched
from outboard.pager.capture import Capture, Saved
from outboard.pager.on_disk import OnDisk
from outboard.pager.pager import Pager
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.snapshot.writing import SnapshotWriter
from outboard.stores import disk
from outboard.stores.snapshot_format import Contents, Meta, Parent
from outboard.vmm import disks
from outboard.vmm.device_state import Departure, runs
from outboard.vmm.guest import QemuGuest
from outboard.vmm.spec import VmSpec

_STEP_S = 30.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that was made: its file, how long the guest stood still, and how its pages were saved."""

    contents: Contents
    pause_ms: float
    seconds: float
    by_faults: int


def new_id(vm: str, now: float) -> str:
    """A name for a snapshot of ``vm`` taken ``now`` (seconds since 1970): when, in UTC, and a number by chance."""
    return f"{vm}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def _spill(directory: Path) -> Iterator[int]:
    """A file without a name, which goes with its last descriptor."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelError(f"open of a file without a name in {directory}", error.errno or 0) from error
    try:
        yield fd
    finally:
        os.close(fd)


class Live:
    """One snapshot of ``guest``, whose memory ``pager`` has.

    :param directory: of the snapshots; :param parent: what it goes on from. :param on_disk: what its disks hold.
    :param scratch: a directory of this snapshot's own, readable by root alone.
    :param spec: what the VM is described by; :param describe: keeps another description of it.
    :param paused: called before the guest stops, with whether it runs, and when it is as it was, with None.

    Synchronization: one thread.
    """

    def __init__(
        self,
        guest: QemuGuest,
        pager: Pager,
        spec: VmSpec,
        directory: Path,
        scratch: Path,
        *,
        parent: Contents | None,
        on_disk: OnDisk | None,
        describe: Callable[[VmSpec], None],
        paused: Callable[[bool | None], None],
    ) -> None:
        self._guest, self._pager, self._spec = guest, pager, spec
        self._directory, self._scratch, self._parent = directory, scratch, parent
        self._on_disk = on_disk
        self._describe, self._paused = describe, paused
        self._layout = [(region.first, region.pages, region.gpa) for region in guest.regions]

    def take(self) -> Taken:
        """Take it.

        :raise OutboardError: it did not work: the guest runs on as if nothing had been, and nothing of it is kept.
        """
        began = time.monotonic()
        now = time.time()
        seed = secrets.randbits(64) if self._parent is None else self._parent.meta.seed
        if self._parent is not None and self._parent.meta.layout != self._layout:
            raise RefusedError(
                "other-memory",
                f"{self._guest.name} has another memory than when {self._parent.meta.id} was taken: take a full one",
            )
        name = new_id(self._guest.name, now)
        with (
            SnapshotWriter(self._directory, name, self._guest.pages, seed, self._parent) as writer,
            _spill(self._directory) as spill,
        ):
            running = runs(self._guest.monitor, self._guest.name)
            # The kernel locks the guest's address space for as long as it takes us to protect some of it.
            with sched.favoured([threading.get_native_id()]):
                capture = self._pager.capture(spill)
            try:
                # QEMU's main loop and this thread are what the guest stands still for.
                with sched.favoured([self._guest.emulator_thread(), threading.get_native_id()]):
                    devices, pause_ms = self._pause(capture, running)
                by_faults = save(capture, writer, self._on_disk)
            finally:
                self._pager.end_capture(capture)
            parent = self._parent
            meta = Meta(
                id=name,
                vm=self._guest.name,
                created=now,
                spec=self._spec.to_toml(),
                running=running,
                layout=self._layout,
                seed=seed,
                parent=None if parent is None else Parent(parent.meta.id, parent.digest),
            )
            contents = writer.finish(meta, devices)
        return Taken(contents, pause_ms, time.monotonic() - began, by_faults)

    def _pause(self, capture: Capture, running: bool) -> tuple[bytes, float]:
        """Have the instant come and go: the devices' state, and the milliseconds that the guest stood still."""
        state = bytearray()
        failure: list[OutboardError | OSError] = []
        departure = Departure(self._guest, self._scratch, running=running)

        def collect() -> None:
            try:
                departure.forward(state.extend)
            except (OutboardError, OSError) as error:
                failure.append(error)

        collector = threading.Thread(target=collect, daemon=True)
        try:
            self._paused(running)
            departure.begin_pause()
            collector.start()
            stopped = departure.wait_paused(_STEP_S)
            overlaid = disks.freeze(self._guest.monitor, self._spec)
            departure.save()
            departure.wait_saved(_STEP_S)
            # QEMU may write to memory as it saves its devices: the instant is behind that.
            capture.take()
            resumed = departure.go_on()
            collector.join(_STEP_S)
            if overlaid:
                self._describe(disks.described(self._guest.monitor, self._spec))
        except BaseException:
            departure.undo()
            with contextlib.suppress(OutboardError):
                self._describe(disks.described(self._guest.monitor, self._spec))
            self._paused(None)
            raise
        finally:
            departure.close()
        self._paused(None)
        if failure or collector.is_alive():
            raise OutboardError(f"the state of {self._guest.name}'s devices did not come through: {failure}")
        return bytes(state), (resumed - stopped) * 1e3


def save(capture: Capture, writer: SnapshotWriter, on_disk: OnDisk | None) -> int:
    """Save every page, those that a disk holds as references; how many the guest was in a hurry for."""
    by_faults = 0

    def add(numbers: NDArray[np.int64], content: NDArray[np.uint8], zero: NDArray[np.bool_], *, hot: bool) -> None:
        if on_disk is not None:
            image, block = on_disk.finder.find(content, page_digests(content), zero)
            pages = content.reshape(-1, PAGE_SIZE)
            for held in np.setdiff1d(image, disk.NONE).tolist():
                there = image == held
                offsets = block[there].astype(np.int64) * PAGE_SIZE
                writer.refer(numbers[there], pages[there].reshape(-1), on_disk.path_of(held), offsets)
            rest = image == disk.NONE
            if not rest.all():
                numbers, content, zero = numbers[rest], pages[rest].reshape(-1), zero[rest]
        if numbers.size:
            writer.add(numbers, content, zero, hot=hot)

    def hurried() -> int:
        count = 0
        for numbers, content, zero in capture.from_faults():
            add(numbers, content, zero, hot=True)
            count += numbers.size
        return count

    while not capture.complete:
        by_faults += hurried()
        sweep = capture.sweep()
        while (saved := _next(sweep)) is not None:
            add(*saved, hot=False)
            # What waits in memory goes first, so that there is room for more.
            by_faults += hurried()
    return by_faults


def _next(sweep: Iterator[Saved]) -> Saved | None:
    # Whoever wants to write to one of these pages waits for us; for what is done with them afterwards nobody does.
    with sched.favoured([threading.get_native_id()]):
        return next(sweep, None)
