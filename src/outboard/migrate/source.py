"""The source's side of a migration, from the command to the end of the source's QEMU.

:class:`Outgoing` is one procedure for all methods: prepare, copy, switch over, finish. Its steps follow the table of
states; whatever goes wrong before COMMIT is undone here, and the guest runs on at the source.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from outboard.errors import (
    CancelledError,
    KernelError,
    NeedsRecoveryError,
    OutboardError,
    PeerError,
    RefusedError,
    UnreachableError,
)
from outboard.linux import pidfd, sched
from outboard.migrate import messages, ranking
from outboard.migrate.conversation import Conversation
from outboard.migrate.desk import Cancel, Desk, Destination, Limit
from outboard.migrate.digests import digests
from outboard.migrate.hinting import Classed, Told, ask, decode_hint
from outboard.migrate.messages import Message
from outboard.migrate.method import EARLY_SECONDS, PAUSE_MOST_S, PAUSE_SHARE, Method, Options
from outboard.migrate.outbox import NEVER, Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.rounds import Rounds
from outboard.migrate.sending import Answerer, BulkSender, Done, Say, Send, decode_done, encode_order
from outboard.migrate.states import Event, Machine, State, Where
from outboard.migrate.worker import Worker
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.trace.idle import IdleTrace
from outboard.trace.writes import WriteTrace, open_write_trace
from outboard.vmm import qemu_process
from outboard.vmm.device_state import Departure, take_back
from outboard.vmm.guest import QemuGuest
from outboard.wire import tls
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind

_STEP_S = 30.0
"""The longest that any one answer of the peer may take."""
_TICK_S = 0.05
_RETRY_S, _RETRY_MOST_S = 0.2, 5.0
"""Between two calls to a destination that does not answer: at first, and at most."""
_CALL_S = 5.0
_UNPACED = 100e6
"""Bytes/s that a link of unknown rate is taken to carry."""

M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Findings:
    """What a migration learns on its way, for the summary."""

    hints: str = "not asked for"
    trace: str | None = None
    arm_ms: float | None = None
    stopped_at: float | None = None
    resume_s: float | None = None
    blackout_ms: float | None = None
    resent_pages: int = 0
    bulk_rate: float | None = None
    verified: bool | None = None
    arrived: messages.Arrived | None = None
    control_bytes: int = 0


class Outgoing:
    """One migration of ``guest`` away from here.

    :param spec: the VM's spec as TOML, for the destination.
    :param directory: for the unix socket of QEMU's device state.
    :param identity: the directory of this host's TLS identity.
    :param began: when the command came, CLOCK_MONOTONIC.
    :param before_commit: called just before the VM is given away.
    :param throttle_gain: of the VM's migration before; see :mod:`outboard.migrate.throttle`.

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
        desk: Desk,
        began: float,
        throttle_gain: float,
        before_commit: Callable[[], None],
    ) -> None:
        self.machine = Machine()
        self.findings = Findings()
        self.copied: Rounds | None = None
        self.outbox = Outbox(guest.pages)
        self.outbox.limit = options.max_bandwidth
        self.migration = migration
        self.guest = guest
        self.destination = destination
        self.options = options
        self._spec = spec
        self._directory = directory
        self._identity = identity
        self._desk = desk
        self.watch = Watch(migration, guest.name, options, self.machine, desk, time.monotonic, began)
        self.watch.outbox = self.outbox
        self._throttle_gain = throttle_gain
        self._before_commit = before_commit
        self._cleanup = contextlib.ExitStack()
        self._trace: WriteTrace | None = None
        self._departure: Departure | None = None
        self._agent: Channel | None = None
        self._streams: dict[str, Channel] = {}
        self._control: Conversation | None = None
        self._bulk: Worker | None = None
        self._answerer: Worker | None = None
        self._asking: Worker | None = None
        self._early: list[Classed] = []
        self._inbox: list[Message] = []
        self._digests = bytearray()
        self._done: list[Done] = []
        self._ordered = 0
        self._cancelled = False
        self._vmm = -1
        self._barriers = self._passed = 0

    def run(self) -> None:
        """Migrate.

        :raise OutboardError: it did not work, and ``machine.safe_at`` says where the VM is: at the source, running, for
            anything that happens before COMMIT.
        """
        try:
            self._prepare()
            self._copy()
            # The guest stands still as long as QEMU's main loop and the thread it starts for this take.
            with sched.favoured([self.guest.emulator_thread()]):
                self._switch()
            self._deliver()
            self._end_vmm()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._close()

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

    def _close(self) -> None:
        if self._control is not None:
            self.findings.control_bytes += self._control.channel.bytes_sent
        self._cleanup.close()

    def take_over(self) -> None:
        """Go on in the place of an engine that died after the commit; raises as :meth:`run`.

        What that one knew of the guest is gone: everything that the destination has not is sent.
        """
        self.machine.state = State.COMMITTED
        self.findings.hints = "lost with the engine that had asked for them"
        try:
            self._vmm = pidfd.open(self.guest.pid)
            self._cleanup.callback(pidfd.close, self._vmm)
            ranking.rank_all(self.outbox, self.guest.memory.populated())
            if not self._recover(UnreachableError("the engine died, and another has taken over")):
                self._deliver()
            self._end_vmm()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._close()

    def _on(self, event: Event) -> None:
        self.machine.on(event)
        self.watch.look(at_once=True)

    def _prepare(self) -> None:
        self._on(Event.PREPARE)
        self._vmm = pidfd.open(self.guest.pid)
        self._cleanup.callback(pidfd.close, self._vmm)
        target = self.destination
        self._agent = tls.connect(target.address, target.port, self._identity, target.name, _STEP_S)
        self._cleanup.callback(self._agent.close)
        layout = [(region.first, region.pages, region.gpa) for region in self.guest.regions]
        prepare = messages.Prepare(migration=self.migration, vm=self.guest.name, spec=self._spec, layout=layout)
        self._agent.send_message(messages.encode(prepare))
        if self._wants_trace:
            self._trace = open_write_trace(self.guest)
            statistics = self._trace.statistics()
            self.findings.trace = statistics.backend
            self.findings.arm_ms = statistics.armed_ns / 1e6
        ranking.rank_all(self.outbox, self.guest.memory.populated())
        with self._asking_for_hints(), self._watching_accesses():
            self._departure = Departure(self.guest, self._directory)
            self._cleanup.callback(self._departure.close)
            self._until(lambda: self._control is not None and self._asking is None, _STEP_S)

    @property
    def _wants_trace(self) -> bool:
        # Where nobody tells what is free, everything goes, written or not.
        method = self.options.method
        return method.rounds or (method is Method.ENLIGHTENED and self.guest.agent_path is not None)

    @contextlib.contextmanager
    def _watching_accesses(self) -> Iterator[None]:
        """What a guest without an agent touches while this lasts goes first."""
        wanted = self.options.method is Method.ENLIGHTENED and self.options.hints and self.guest.agent_path is None
        if not wanted:
            yield
            return
        try:
            idle = IdleTrace(self.guest)
        except RefusedError as error:
            self.findings.hints = f"none: the VM has no guest agent, and {error}"
            yield
            return
        began = time.monotonic()
        yield
        touched = self.guest.memory.populated() - idle.idle()
        ranking.rank_touched(self.outbox, touched)
        took = (time.monotonic() - began) * 1e3
        self.findings.hints = f"no guest agent; accesses: {len(touched)} pages touched in {took:.0f} ms"

    @contextlib.contextmanager
    def _asking_for_hints(self) -> Iterator[None]:
        """While this lasts the guest is asked, if it is to be."""
        if not self.options.hints or self.options.method is Method.POST_COPY:
            yield
            return
        # A VM that is evicted gets little of a processor, and cannot answer on that.
        with sched.favoured([self.guest.emulator_thread(), *(vcpu.tid for vcpu in self.guest.vcpus)]):
            self._asking = Worker("outboard-hints", lambda link: ask(self.guest, self.outbox, link))
            self._cleanup.callback(self._asking.end)
            yield

    def _take_hint(self) -> None:
        report = self._asking.hear(0) if self._asking is not None else None
        if report is None:
            return
        match decode_hint.decode(report):
            case Told(words):
                self.findings.hints = words
                self._asking = None
                self.outbox.halted = True
            case Classed(first, count) as classed:
                if self._trace is not None:
                    range_ = PageSet.from_runs(self.outbox.pages, np.array([[first, count]]))
                    ranking.rank_written(self.outbox, self._trace.peek(range_) & range_)
                self._early.append(classed)
                self._send_early()

    def _send_early(self) -> None:
        """Order what has been classed so far, as soon as there is somebody to send it."""
        if self._bulk is None or self.options.method is not Method.ENLIGHTENED:
            return
        for one in self._early:
            self._order(Send(one.first, one.count, ranking.EARLY_UPTO, paced=True, seconds=EARLY_SECONDS))
            self._order(Send(one.first, one.count, ranking.QUIET_UPTO, paced=True, idle=True))
        self._early.clear()

    def _take_prepared(self) -> None:
        """The destination listens: open the streams while its QEMU starts."""
        if self._agent is not None:
            prepared = messages.expect(self._agent.receive(_STEP_S).payload, messages.Prepared)
            self._streams = self._open_streams(prepared)

    def _take_welcome(self) -> None:
        """The destination is ready for pages."""
        streams = self._streams
        messages.expect(streams["control"].receive(_STEP_S).payload, messages.Welcome)
        self._answerer = self._worker("outboard-answer", streams["urgent"], urgent=True)
        self._bulk = self._worker("outboard-bulk", streams["bulk"], urgent=False)
        self._control = Conversation(streams["control"])
        self._on(Event.READY)
        self._send_early()

    def _open_streams(self, prepared: messages.Prepared) -> dict[str, Channel]:
        target = self.destination

        def open_one(role: str) -> Channel:
            channel = tls.connect(target.address, prepared.port, self._identity, target.name, _STEP_S, self.guest.pages)
            self._cleanup.callback(channel.close)
            channel.send_message(
                messages.encode(messages.Hello(migration=self.migration, role=role, token=prepared.tokens[role]))
            )
            return channel

        # Its threads have ended before the workers are forked.
        with ThreadPoolExecutor(len(messages.ROLES)) as pool:
            return dict(zip(messages.ROLES, pool.map(open_one, messages.ROLES), strict=True))

    def _worker(self, name: str, channel: Channel, *, urgent: bool) -> Worker:
        if urgent:
            worker = Worker(name, lambda _: Answerer(self.guest, self.outbox, channel).serve(), urgent=True)
        else:
            worker = Worker(name, lambda link: BulkSender(self.guest, self.outbox, channel, link).serve())
        self._cleanup.callback(worker.end)
        return worker

    def _copy(self) -> None:
        if self.options.method is Method.ENLIGHTENED:
            self._await_sent()
            self._send_stale_early()
        elif self.options.method.rounds:
            self._copy_rounds()
        self._await_placed()

    def _send_stale_early(self) -> None:
        """Send again what was written since it was sent, while the guest still runs: the less is left for the pause."""
        sent = self.outbox.already_sent()
        written = self._written(sent)
        ranking.revive(self.outbox, written)
        stale = written & sent
        self.outbox.again(stale, ranking.STALE_NOW)
        self.findings.resent_pages += len(stale)
        self._order(Send(0, self.outbox.pages, ranking.STALE_NOW, paced=False))
        self._await_sent()

    def _copy_rounds(self) -> None:
        if self._trace is None:
            raise AssertionError("rounds need a trace")

        def send(meanwhile: Callable[[], None]) -> Done:
            self._order(Send(0, self.outbox.pages, ranking.LAST, paced=False))
            return self._await_sent(meanwhile)

        self.copied = Rounds(
            self.guest, self.outbox, self._trace, self.options, send, lambda: self.watch.elapsed, self._throttle_gain
        )
        # Held back until it has been given away: what it writes before it stops is sent in the pause.
        self._cleanup.callback(self.copied.release)
        self.watch.rounds = self.copied
        self.copied.run()
        self.findings.resent_pages += self.copied.resent_pages

    def _written(self, within: PageSet | None = None) -> PageSet:
        return PageSet(self.outbox.pages) if self._trace is None else self._trace.collect(within)

    def _switch(self) -> None:
        control, departure = self._control, self._departure
        if control is None or departure is None:
            raise AssertionError("a migration that is not prepared cannot switch over")
        self._on(Event.SWITCH)
        threading.Thread(target=self._forward, args=(departure, control), name="device-state", daemon=True).start()
        departure.begin_pause()
        self.findings.stopped_at = departure.wait_paused(_STEP_S)
        self._settle_stale(control)
        if self.options.verify:
            self._await_message(messages.Settled)
            self._send_rest()
            self._verify(control)
        departure.save()
        departure.wait_saved(_STEP_S)
        self._forget_late(control)
        if not self.options.verify:
            self._await_message(messages.Settled)
        self._await_message(messages.Loaded)
        if self._cancelled:
            raise CancelledError("cancelled at the switch-over; the VM runs at the source")
        self._before_commit()
        self._on(Event.COMMIT)
        # Whatever comes instead of an answer, also that the other engine gives up: the delivery sees to it.
        with contextlib.suppress(OutboardError):
            control.send(messages.Commit())
            self._await_resumed()

    def _await_resumed(self) -> None:
        self._await_message(messages.Resumed)
        self._resumed()

    def _resumed(self) -> None:
        if self.findings.stopped_at is not None:
            self.findings.blackout_ms = (time.time() - self.findings.stopped_at) * 1e3
        self.findings.resume_s = self.watch.elapsed
        self._on(Event.RESUMED)

    def _deliver(self) -> None:
        """Send what is still here, however often the streams break off, until the destination has all of it."""
        if self.copied is not None:
            self.copied.release()
        sent = self.options.verify
        while True:
            try:
                if self.machine.state is State.COMMITTED:
                    self._await_resumed()
                if not sent:
                    self._send_rest()
                self._arrived(self._await_message(messages.Arrived, timeout=None))
            except UnreachableError as error:
                if not self._recover(error):
                    sent = False
                    continue
            return

    def _recover(self, why: UnreachableError) -> bool:
        """Call again until somebody answers; whether that was to say that everything has arrived.

        :raise OutboardError: the destination has sworn the VM off, which then is ours again; or it has ended there.
        """
        if self.machine.state is State.POSTCOPY:
            self._on(Event.BREAK)
        self._hang_up()
        self.watch.broken = str(why)
        delay = _RETRY_S
        while True:
            with contextlib.suppress(UnreachableError):
                if self._call_again():
                    return True
                self.watch.broken = None
                return False
            self._until_moment(delay)
            delay = min(2 * delay, _RETRY_MOST_S)

    def _call_again(self) -> bool:
        target = self.destination
        with tls.connect(target.address, target.port, self._identity, target.name, _CALL_S) as agent:
            agent.send_message(messages.encode(messages.Recover(migration=self.migration)))
            answer = messages.decode(agent.receive(_STEP_S).payload)
        match answer:
            case messages.Prepared():
                self._take_up(self._open_streams(answer))
                return False
            case messages.Arrived():
                if self.machine.state is State.COMMITTED:
                    self._resumed()
                if self.machine.state is State.RECOVERING:
                    self._on(Event.RECOVERED)
                self._arrived(answer)
                return True
            case messages.Refused() if self.machine.state is State.COMMITTED:
                self._undo()
                self._on(Event.REFUSED)
                raise OutboardError(
                    f"{target.name} never heard that {self.guest.name} was given to it, and has sworn it off; the VM "
                    "goes on at the source"
                )
        raise PeerError(f"{target.name} answered {type(answer).__name__} to a call for {self.migration}")

    def _take_up(self, streams: dict[str, Channel]) -> None:
        """Go on where the destination is."""
        try:
            messages.expect(streams["control"].receive(_STEP_S).payload, messages.Welcome)
            have = self._receive_have(streams["control"])
        except OutboardError:
            for channel in streams.values():
                channel.close()
            raise
        self._streams = streams
        self.outbox.sent[:] = have.mask()
        self._answerer = self._worker("outboard-answer", streams["urgent"], urgent=True)
        self._bulk = self._worker("outboard-bulk", streams["bulk"], urgent=False)
        self._control = Conversation(streams["control"])
        if self.machine.state is State.COMMITTED:
            self._resumed()
        else:
            self._on(Event.RECOVERED)

    def _receive_have(self, control: Channel) -> PageSet:
        have = PageSet(self.outbox.pages)
        while True:
            frame = control.receive(_STEP_S)
            if frame.kind is not Kind.PAGESET:
                messages.expect(frame.payload, messages.Have)
                return have
            part = control.pageset(frame)
            if part.name != messages.HAVE:
                raise PeerError(f"a page set named {part.name} came where none is due")
            have.bits()[part.first // 8 :][: part.bits.size] = part.bits

    def _hang_up(self) -> None:
        """End the senders and close the streams; nothing that they had promised holds any more."""
        if self._control is not None:
            self.findings.control_bytes += self._control.channel.bytes_sent
        for worker in (self._bulk, self._answerer):
            if worker is not None:
                worker.end()
        for channel in self._streams.values():
            channel.close()
        self._bulk = self._answerer = self._control = self._agent = None
        self._streams = {}
        self._inbox, self._done, self._ordered = [], [], 0
        self._barriers = self._passed = 0

    def _until_moment(self, seconds: float) -> None:
        """Hear orders for a while."""
        over = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= over, None)

    def _forward(self, departure: Departure, control: Conversation) -> None:
        # When the peer or the VMM ends meanwhile, the main thread hears of it by its own streams.
        with contextlib.suppress(OSError, OutboardError):
            departure.forward(control.send_stream)

    def _settle_stale(self, control: Conversation) -> None:
        """In the pause: what was sent and has been written since is sent again as far as time allows, or forgotten.

        Nothing here waits: QEMU saves its devices while the pages travel, and the destination holds what it saves until
        they are in place.
        """
        sent = self.outbox.already_sent()
        if self.options.method.rounds:
            # Also what was written during the last round: the destination holds it as it was before.
            stale = self._written() | self.outbox.unsent()
        else:
            written = self._written(sent)
            ranking.revive(self.outbox, written)
            stale = written & sent
        self.findings.resent_pages += len(stale)
        if self.options.method.resumes_early:
            rate = self.outbox.statistics().rate or _UNPACED
            seconds = min(PAUSE_MOST_S, PAUSE_SHARE * self.options.max_downtime)
            now, later = ranking.split_stale(self.outbox, stale, int(seconds * rate / PAGE_SIZE))
            upto = ranking.STALE_NOW
        else:
            now, later, upto = stale, PageSet(stale.pages), ranking.LAST
        if later:
            self.outbox.again(later, ranking.STALE_LATER)
            control.send_pages(messages.FORGET, later, messages.Forget())
        if now:
            self.outbox.again(now, ranking.STALE_NOW)
            self._order(Send(0, self.outbox.pages, upto, paced=False))
        control.send(messages.Final(self._barrier()))

    def _forget_late(self, control: Conversation) -> None:
        """QEMU itself may write to the guest's memory while it saves devices: such pages are fetched again."""
        sent = self.outbox.already_sent()
        written = self._written(sent)
        ranking.revive(self.outbox, written)
        if late := written & sent:
            self.outbox.again(late, ranking.STALE_LATER)
            self.findings.resent_pages += len(late)
            control.send_pages(messages.FORGET, late, messages.Forget())

    def _send_rest(self) -> None:
        """Everything that is still to come, and which pages those are; all others read as zeros."""
        control = self._control
        if control is None:
            raise AssertionError("nobody is there to be sent anything")
        self._order(Send(0, self.outbox.pages, ranking.LAST, paced=True))
        try:
            # Free when the guest was asked, or without memory then, and written since.
            alive = self.guest.memory.populated() if self._trace is None else self._written()
        except KernelError:
            # QEMU has died, and with it what had been written: whatever has memory may be alive.
            alive = self.guest.memory.populated()
        ranking.revive(self.outbox, alive)
        live = PageSet.from_mask(self.outbox.rank != NEVER)
        control.send_pages(messages.LIVE, live, messages.Live())
        self._order(Send(0, self.outbox.pages, ranking.LAST, paced=True))
        done = self._await_sent()
        if done.octets > 64 * PAGE_SIZE:
            self.findings.bulk_rate = done.octets / done.seconds
        self._say(messages.AllSent())

    def _verify(self, control: Conversation) -> None:
        """Compare the digest of every live page, both guests standing still.

        :raise OutboardError: a page differs.
        """
        control.send(messages.Digests())
        self._await_message(messages.Digests, timeout=120)
        numbers = np.flatnonzero(self.outbox.rank != NEVER)
        theirs: NDArray[np.uint64] = np.frombuffer(self._digests, dtype="<u8").astype(np.uint64)
        ours = digests(self.guest, PageSet.from_mask(self.outbox.rank != NEVER))
        if theirs.size != ours.size:
            raise PeerError(f"the destination digested {theirs.size} pages of {ours.size}")
        different = numbers[theirs != ours]
        self.findings.verified = not different.size
        if different.size:
            raise OutboardError(
                f"{different.size} of {ours.size} pages of {self.guest.name} differ at the destination, the first is "
                f"page {different[0]}; the VM goes on at the source"
            )

    def _arrived(self, message: messages.Arrived) -> None:
        self.findings.arrived = message
        self._on(Event.ARRIVED)

    def _end_vmm(self) -> None:
        """The VM is whole over there: what is left here is memory to give back."""
        qemu_process.end(self._vmm)

    def _give_up(self, error: BaseException) -> None:
        event = Event.CANCEL if isinstance(error, CancelledError) else Event.FAIL
        if not self.machine.accepts(event):
            return
        safe_at_source = self.machine.state in (State.NEW, State.PREPARING, State.COPYING, State.SWITCHING)
        with contextlib.suppress(OutboardError, OSError):
            if safe_at_source and self._control is not None:
                self._control.send(messages.Failed(why=str(error)))
        for worker in (self._bulk, self._answerer):
            if worker is not None:
                worker.end()
        if safe_at_source:
            self._undo()
        self._on(event)

    def _undo(self) -> None:
        """Leave the guest running at the source as it was before."""
        if self._control is not None:
            self._control.channel.close()
        with contextlib.suppress(OutboardError, OSError):
            if self._departure is not None:
                self._departure.undo()
            else:
                take_back(self.guest.monitor)
        with contextlib.suppress(OutboardError, OSError):
            if self._trace is not None:
                self._trace.close()

    def _order(self, order: Send) -> None:
        if self._bulk is None:
            raise AssertionError("orders need a bulk sender")
        self._ordered += 1
        self._bulk.tell(encode_order(order))

    def _say(self, message: Message) -> None:
        if self._bulk is not None:
            self._bulk.tell(encode_order(Say(messages.encode(message))))

    def _await_sent(self, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Wait until all orders are done, and do something else at each tick; the sum of what they did."""

        def ready() -> bool:
            meanwhile()
            return len(self._done) >= self._ordered

        self._until(ready, None)
        done, self._done, self._ordered = self._done, [], 0
        return Done(
            sum(one.octets for one in done), sum(one.seconds for one in done), all(one.complete for one in done)
        )

    def _await_placed(self) -> None:
        """Wait until all that the bulk has sent is in the destination's memory."""
        number = self._barrier()
        self._until(lambda: self._passed >= number, _STEP_S)

    def _barrier(self) -> int:
        self._barriers += 1
        self._say(messages.Barrier(self._barriers))
        return self._barriers

    def _await_message(self, kind: type[M], timeout: float | None = _STEP_S) -> M:
        self._until(lambda: bool(self._inbox), timeout)
        message = self._inbox.pop(0)
        if not isinstance(message, kind):
            raise PeerError(f"the destination sent {type(message).__name__} where {kind.__name__} was due")
        return message

    def _until(self, ready: Callable[[], bool], timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ready():
            self._pump(_TICK_S)
            if deadline is not None and time.monotonic() > deadline:
                raise UnreachableError(
                    f"{self.destination.name} did not answer within {timeout:.0f} s while the migration was "
                    f"{self.machine.state.value}"
                )

    def _pump(self, timeout: float) -> None:
        """Take in whatever anybody has to say."""
        control = self._control.channel if self._control is not None else None
        speakers: dict[int, Callable[[], None]] = {self._desk.fileno(): self._take_order}
        if self.machine.safe_at is Where.SOURCE:
            # Later it is only its memory that counts, and that outlives it.
            speakers[self._vmm] = self._mourn
        if control is not None:
            speakers[control.fileno()] = self._take_frame
        elif self._streams:
            speakers[self._streams["control"].fileno()] = self._take_welcome
        elif self._agent is not None:
            speakers[self._agent.fileno()] = self._take_prepared
        if self._asking is not None:
            speakers[self._asking.fileno()] = self._take_hint
        for worker in (self._bulk, self._answerer):
            if worker is not None:
                speakers[worker.fileno()] = lambda worker=worker: self._take_report(worker)  # type: ignore[misc]
        speakers.pop(-1, None)
        for fd in select.select(list(speakers), [], [], timeout)[0]:
            speakers[fd]()
        self.watch.look()
        if self._cancelled and self.machine.accepts(Event.CANCEL):
            raise CancelledError("cancelled; the VM runs at the source")

    def _mourn(self) -> None:
        raise OutboardError(f"QEMU of {self.guest.name}, process {self.guest.pid}, has ended at the source")

    def _take_order(self) -> None:
        match self._desk.order():
            case Cancel():
                self._cancelled = True
            case Limit(max_bandwidth):
                self.outbox.limit = max_bandwidth

    def _take_frame(self) -> None:
        if self._control is None:
            return
        channel = self._control.channel
        while True:
            frame = channel.receive(_STEP_S)
            if frame.kind is Kind.STREAM and self.options.verify:
                if len(self._digests) + len(frame.payload) > 8 * self.outbox.pages:
                    raise PeerError("the destination sent more digests than the guest has pages")
                self._digests += frame.payload
            elif frame.kind is Kind.MESSAGE:
                message = messages.decode(frame.payload)
                if isinstance(message, messages.BarrierPassed):
                    self._passed = message.number
                else:
                    self._inbox.append(message)
            else:
                raise PeerError(f"a {frame.kind.name} frame came where only messages are due")
            if not channel.pending():
                return

    def _take_report(self, worker: Worker) -> None:
        report = worker.hear(0)
        if report is not None and worker is self._bulk:
            self._done.append(decode_done.decode(report))
