"""The source's side of a migration, from the command to the end of the source's QEMU.

:class:`Outgoing` is one procedure for all methods: prepare, copy, switch over, deliver. Its steps follow the table of
states; whatever goes wrong before COMMIT is undone here, and the guest runs on at the source.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import (
    CancelledError,
    NeedsRecoveryError,
    OutboardError,
    PeerError,
    RefusedError,
    UnreachableError,
)
from outboard.linux import pidfd, sched
from outboard.migrate import messages, ranking
from outboard.migrate.delivery import Delivery, SwornOffError
from outboard.migrate.desk import Desk, Destination
from outboard.migrate.devices import Devices
from outboard.migrate.digests import digests
from outboard.migrate.findings import Findings
from outboard.migrate.hinting import Hints
from outboard.migrate.line import Line
from outboard.migrate.method import EARLY_SECONDS, Method, Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.references import References
from outboard.migrate.rounds import Rounds
from outboard.migrate.sending import Done, Send
from outboard.migrate.stale import Stale
from outboard.migrate.states import Event, Machine, State, Where
from outboard.migrate.steering import STEP_S, Speakers, Steering
from outboard.migrate.streams import suggested
from outboard.migrate.worker import Worker
from outboard.pages import LARGE, PAGE_SIZE
from outboard.trace.writes import open_write_trace, traces_pages
from outboard.vmm import qemu_process
from outboard.vmm.device_state import Departure, take_back
from outboard.vmm.guest import QemuGuest
from outboard.vmm.large_pages import collapse, large_mappings
from outboard.vmm.spec import parse_spec


class Outgoing:
    """One migration of ``guest`` away from here.

    :param spec: the VM's spec as TOML, for the destination.
    :param directory: for the unix socket of QEMU's device state.
    :param identity: the directory of this host's TLS identity. :param indexes: that of the disk images' indexes.
    :param began: when the command came, CLOCK_MONOTONIC.
    :param before_commit: called just before the VM is given away.
    :param free: called when its QEMU has ended; gives back its memory's file.
    :param throttle_gain: of the VM's migration before; see :mod:`outboard.migrate.throttle`.
    :param running: the guest runs; False: it is paused, and stays so wherever it is.

    Synchronization: one thread; it forks workers, and so must be the only one when :meth:`run` is called.
    """

    def __init__(
        self,
        migration: str,
        guest: QemuGuest,
        destination: Destination,
        options: Options,
        *,
        spec: str,
        directory: Path,
        identity: Path,
        indexes: Path,
        desk: Desk,
        began: float,
        throttle_gain: float,
        running: bool,
        before_commit: Callable[[], None],
        free: Callable[[], None],
    ) -> None:
        self.migration = migration
        self.guest = guest
        self.destination = destination
        self.options = options
        self.machine = Machine()
        self.findings = Findings()
        self.copied: Rounds | None = None
        self._large = large_mappings(guest)
        unit = max(region.page_size for region in guest.regions) // PAGE_SIZE
        self.outbox = Outbox(guest.pages, unit=unit, digested=bool(self._large) or not traces_pages())
        self.findings.large_mappings = len(self._large) // LARGE
        self.outbox.limit = options.max_bandwidth
        self.watch = Watch(migration, guest.name, options, self.machine, desk, time.monotonic, began)
        self.watch.outbox = self.outbox
        self._spec, self._directory = spec, directory
        self._throttle_gain, self._before_commit, self._free = throttle_gain, before_commit, free
        self._running = running
        self._departure: Departure | None = None
        self._early: list[tuple[int, int]] = []
        self._vmm = -1
        self._cleanup = contextlib.ExitStack()
        self._steering = Steering(self.machine, self.watch, desk, self.outbox, options, destination.name)
        self._steering.listen(self._speakers)
        disks = parse_spec(spec, f"the spec of {guest.name}").disks
        self.references = References(disks, indexes, enabled=options.blocks == "auto")
        self._cleanup.callback(self.references.close)
        self.line = Line(
            migration,
            guest,
            self.outbox,
            destination,
            identity,
            self._steering,
            self._ready,
            options.compress,
            self.references,
        )
        self._cleanup.callback(self.line.hang_up)
        self._hints = Hints(guest, self.outbox, options, self._steering, self.findings, self._classed)
        self._cleanup.callback(self._hints.close)
        self.devices = Devices(guest, self.outbox, self.findings)
        self._stale = Stale(guest, self.outbox, self.line, options, self.findings, self.devices)
        self._delivery = Delivery(
            guest.name,
            self.outbox,
            self.line,
            self._stale,
            self._steering,
            self.watch,
            self.findings,
            self._resumed,
        )

    def run(self) -> None:
        """Migrate.

        :raise OutboardError: it did not work, and ``machine.safe_at`` says where the VM is: at the source, running, for
            anything that happens before COMMIT.
        """
        with self._ending():
            self._prepare()
            self._copy()
            # The guest stands still as long as QEMU's main loop and the thread it starts for this take.
            with sched.favoured([self.guest.emulator_thread()]):
                self._switch()
            if self.copied is not None:
                self.copied.release()
            self._delivery.run(sent=self.options.verify)

    def take_over(self) -> None:
        """Go on in the place of an engine that died after the commit; raises as :meth:`run`.

        What that one knew of the guest is gone: everything that the destination has not is sent.
        """
        with self._ending():
            self.machine.state = State.COMMITTED
            self.findings.hints = "lost with the engine that had asked for them"
            self._watch_vmm()
            ranking.rank_all(self.outbox, self.guest.memory.populated())
            self._delivery.take_over()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
            # The VM is whole over there: what is left here is memory to give back.
            qemu_process.end(self._vmm)
            self._free()
            self.findings.total_s = self.watch.elapsed
            self._hear_of_large()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._cleanup.close()

    def _hear_of_large(self) -> None:
        if self._large and self.line.is_open:
            with contextlib.suppress(OutboardError):
                rebuilt = self.line.await_message(messages.Rebuilt)
                self.findings.large_mappings_after = rebuilt.large_mappings

    def _fail(self, error: BaseException) -> None:
        begun = self.machine.state not in (State.NEW, State.PREPARING)
        self._give_up(error)
        if self.machine.state is State.PAUSED:
            raise NeedsRecoveryError(
                f"{self.guest.name} has been given to {self.destination.name}, and {len(self.outbox.unsent())} of "
                f"its pages are still here: {error}"
            ) from error
        if begun and isinstance(error, UnreachableError):
            # Its agent was there; what broke off is the migration.
            raise OutboardError(f"{error}; the VM goes on at the source") from error

    def _give_up(self, error: BaseException) -> None:
        event = Event.CANCEL if isinstance(error, CancelledError) else Event.FAIL
        if isinstance(error, SwornOffError):
            event = Event.REFUSED
        if not self.machine.accepts(event):
            return
        ours = self.machine.safe_at is Where.SOURCE
        if ours and self.line.is_open:
            with contextlib.suppress(OutboardError, OSError):
                self.line.control.send(messages.Failed(why=str(error)))
        self.line.hang_up()
        if ours or event is Event.REFUSED:
            self._undo()
        self._steering.on(event)

    def _undo(self) -> None:
        """Leave the guest running at the source as it was before."""
        with contextlib.suppress(OutboardError, OSError):
            if self._departure is not None:
                self._departure.undo()
            else:
                take_back(self.guest.monitor, run=self._running)
        with contextlib.suppress(OutboardError, OSError):
            if self._stale.trace is not None:
                self._stale.trace.close()
            # The trace has broken up those that were written to.
            collapse(self.guest, self._large.whole(LARGE) - large_mappings(self.guest))

    def _watch_vmm(self) -> None:
        self._vmm = pidfd.open(self.guest.pid)
        self._cleanup.callback(pidfd.close, self._vmm)

    def _speakers(self) -> Speakers:
        # Later it is only its memory that counts, and that outlives it.
        return {self._vmm: self._mourn} if self.machine.safe_at is Where.SOURCE else {}

    def _mourn(self) -> None:
        raise OutboardError(f"QEMU of {self.guest.name}, process {self.guest.pid}, has ended at the source")

    def _prepare(self) -> None:
        self._steering.on(Event.PREPARE)
        self._watch_vmm()
        guest = self.guest
        layout = [(region.first, region.pages, region.gpa) for region in guest.regions]
        streams = self.options.streams or suggested(self.options, self.destination.address)
        self.line.request(
            messages.Prepare(
                migration=self.migration,
                vm=guest.name,
                spec=self._spec,
                layout=layout,
                running=self._running,
                streams=streams,
            )
        )
        if self._needs_trace:
            self._arm()
        if self.references.lacks_indexes:
            indexing = Worker("outboard-index", lambda _: self.references.make_indexes())
            self._cleanup.callback(indexing.end)
        ranking.rank_all(self.outbox, guest.memory.populated())
        with self._hints.gathering(self._stale.trace):
            self._departure = Departure(guest, self._directory, running=self._running)
            self._cleanup.callback(self._departure.close)
            if self.options.method.resumes_early:
                self.devices.ask()
            self._steering.until(lambda: self.line.is_open and self._hints.told, STEP_S)
        if not self._needs_trace:
            # Where the kernel has one: QEMU may write to pages as it saves devices, and they be asked for before that.
            with contextlib.suppress(RefusedError):
                self._arm()

    def _arm(self) -> None:
        self._stale.trace = open_write_trace(self.guest, coarse=True)
        statistics = self._stale.trace.statistics()
        self.findings.trace = statistics.backend
        self.findings.arm_ms = statistics.armed_ns / 1e6

    @property
    def _needs_trace(self) -> bool:
        # Where nobody tells what is free, everything goes, written or not.
        method = self.options.method
        return method.rounds or (method is Method.ENLIGHTENED and self.guest.agent_path is not None)

    def _ready(self) -> None:
        """The destination is ready for pages."""
        if self._large:
            early = not self.options.method.resumes_early
            self.line.control.send_pages(messages.LARGE, self._large, messages.Large(early=early))
        if self.references.wanted:
            self.line.control.send(self.references.ask())
        self._steering.on(Event.READY)
        self._send_early()

    def _classed(self, first: int, count: int) -> None:
        self._early.append((first, count))
        if self.line.is_open:
            self._send_early()

    def _send_early(self) -> None:
        """Order what has been classed so far, as soon as there is somebody to send it to."""
        if self.options.method is Method.ENLIGHTENED:
            for first, count in self._early:
                self.line.order(Send(first, count, ranking.EARLY_UPTO, paced=True, seconds=EARLY_SECONDS, changes=True))
                self.line.order(Send(first, count, ranking.QUIET_UPTO, paced=True, haltable=True, changes=True))
        self._early.clear()

    def _copy(self) -> None:
        if self.options.method is Method.ENLIGHTENED:
            self.line.await_sent()
            self._stale.send_early()
        elif self.options.method.rounds:
            self._copy_rounds()
        self.line.await_placed()

    def _copy_rounds(self) -> None:
        if self._stale.trace is None:
            raise AssertionError("rounds need a trace")

        def send(meanwhile: Callable[[], None]) -> Done:
            self.line.order(Send(0, self.outbox.pages, ranking.LAST, paced=False, haltable=True, changes=True))
            return self.line.await_sent(meanwhile)

        elapsed, gain = lambda: self.watch.elapsed, self._throttle_gain
        self.copied = Rounds(
            self.guest, self.outbox, self._stale.trace, self.options, self._steering, send, elapsed, gain
        )
        # Until now it said that the guest has told all of its pages' classes.
        self.outbox.halted = False
        # Held back until it has been given away: what it writes before it stops is sent in the pause.
        self._cleanup.callback(self.copied.release)
        self.watch.rounds = self.copied
        self.copied.run()
        self.findings.resent_pages += self.copied.resent_pages

    def _switch(self) -> None:
        departure, line, steering = self._departure, self.line, self._steering
        if departure is None:
            raise AssertionError("a migration that is not prepared cannot switch over")
        # What is left of rounds that were cut short is sent in the pause, however long that takes.
        settled_s = None if self.copied is not None and self.copied.cut_short else STEP_S
        steering.on(Event.SWITCH)
        threading.Thread(target=self._forward, args=(departure,), name="device-state", daemon=True).start()
        departure.begin_pause()
        self.findings.stopped_at = departure.wait_paused(STEP_S)
        self._stale.settle()
        if self.options.verify:
            line.await_message(messages.Settled, settled_s)
            self._delivery.send_rest()
            self._verify()
        departure.save()
        departure.wait_saved(STEP_S)
        self._stale.forget_late()
        if not self.options.verify:
            line.await_message(messages.Settled, settled_s)
        line.await_message(messages.Loaded)
        if steering.cancelled:
            raise CancelledError("cancelled at the switch-over; the VM runs at the source")
        self._before_commit()
        steering.on(Event.COMMIT)
        # Whatever comes instead of an answer, also that the other engine gives up: the delivery sees to it.
        with contextlib.suppress(OutboardError):
            line.control.send(messages.Commit())
            self._delivery.await_resumed()

    def _forward(self, departure: Departure) -> None:
        # When the peer or the VMM ends meanwhile, the main thread hears of it by its own streams.
        with contextlib.suppress(OSError, OutboardError):
            departure.forward(self.line.control.send_stream)

    def _resumed(self) -> None:
        if self.findings.stopped_at is not None:
            self.findings.blackout_ms = (time.time() - self.findings.stopped_at) * 1e3
        self.findings.resume_s = self.watch.elapsed
        self._steering.on(Event.RESUMED)

    def _verify(self) -> None:
        """Compare the digest of every live page, both guests standing still.

        :raise OutboardError: a page differs.
        """
        self.line.digests = bytearray()
        self.line.control.send(messages.Digests())
        self.line.await_message(messages.Digests, timeout=120)
        live = self.outbox.live()
        theirs: NDArray[np.uint64] = np.frombuffer(self.line.digests, dtype="<u8").astype(np.uint64)
        ours = digests(self.guest, live)
        if theirs.size != ours.size:
            raise PeerError(f"the destination digested {theirs.size} pages of {ours.size}")
        different = live.numbers()[theirs != ours]
        self.findings.verified = not different.size
        if different.size:
            raise OutboardError(
                f"{different.size} of {ours.size} pages of {self.guest.name} differ at the destination, the first is "
                f"page {different[0]}; the VM goes on at the source"
            )
