"""The destination's side of a migration: a QEMU that waits, memory that is absent, and whoever fills it.

The QEMU here runs the guest only after the source's COMMIT. Before it, any end of the control stream ends this QEMU;
after it, nothing does: what is missing is waited for.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import time
from collections.abc import Callable

from outboard.errors import (
    KernelError,
    NeedsRecoveryError,
    OutboardError,
    PeerError,
    RefusedError,
    UnreachableError,
)
from outboard.linux import pidfd, sched
from outboard.linux.tcp import tcp_info
from outboard.migrate import messages
from outboard.migrate.conversation import Conversation
from outboard.migrate.digests import digests
from outboard.migrate.messages import Prepare
from outboard.migrate.receiving import BulkReceiver
from outboard.migrate.worker import Worker
from outboard.pager.arriving import ArrivingMemory
from outboard.pager.peer_faults import FaultCounters, PeerFaultServer
from outboard.pager.rebuilding import Rebuilding
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Where
from outboard.stores.disk import DiskStore
from outboard.stores.images.images import Images
from outboard.stores.images.sampling import sample
from outboard.stores.peer import PeerStore
from outboard.vmm.device_state import Arrival
from outboard.vmm.guest import Guest
from outboard.wire.channel import Channel
from outboard.wire.frames import Frame, Kind, PageSetPart

_STEP_S = 30.0
_LOOK_S = 1.0
_TICK_S = 0.002
_DIGEST_PART = 1 << 20


def check_layout(guest: Guest, prepare: Prepare) -> None:
    """See that both ends number the same pages.

    :raise RefusedError: ``memory-layout``: the destination's QEMU lays out memory otherwise.
    """
    ours = [(region.first, region.pages, region.gpa) for region in guest.regions]
    if ours != [tuple(region) for region in prepare.layout]:
        raise RefusedError(
            "memory-layout",
            f"{prepare.vm}: the QEMU started here lays out memory as {ours}, the source's as {prepare.layout}; "
            "use the same QEMU version, machine type and memory size on both hosts",
        )


class Incoming:
    """One migration of a VM to here.

    :param guest: attached.
    :param memory: its memory.
    :param arrival: takes its devices' state; None: they are loaded, and the VM is ours already.
    :param large: its large mappings, to be rebuilt.
    :param source: the host that it comes from.
    :param running: let it run once it is ours; False: it was paused there.
    :param commit: called once, before the VM runs: whether it may be ours.
    :param note_arrived: keeps the message that no page is missing, for a source that does not hear it.
    :param images: of its disks, as they are here; None: none is looked at.
    :param reopen: waits for the source to call again, and lets its streams in.

    Synchronization: one thread; it forks workers, and so must be the only one when :meth:`run` is called.
    """

    def __init__(
        self,
        guest: Guest,
        memory: ArrivingMemory,
        arrival: Arrival | None,
        large: Rebuilding,
        *,
        source: str,
        running: bool,
        commit: Callable[[], bool],
        note_arrived: Callable[[bytes], None],
        images: Images | None = None,
        reopen: Callable[[], dict[str, Channel]],
    ) -> None:
        self.committed = arrival is None
        self._guest = guest
        self._source, self._running = source, running
        self._commit, self._note_arrived, self._reopen = commit, note_arrived, reopen
        self._memory, self._arrival, self._large = memory, arrival, large
        # What its QEMU will write to is not to be read before that owns it: old blocks would stay in the page cache.
        self._images = [layer.file if layer.fixed else None for layer in images.layers] if images is not None else []
        self._rebuilding: Worker | None = None
        self._counters = FaultCounters()
        self._faults: Worker | None = None
        self._sets: dict[int, PageSet] = {}
        self._live: PageSet | None = None
        self._all_sent = False
        self._passed: list[int] = []
        self._mapped_before_resume = 0

    def run(self, streams: dict[str, Channel] | None) -> None:
        """Take the VM in. Once it is ours, streams that break off are waited for, however long.

        :param streams: as :class:`~outboard.migrate.admission.Admission` let them in, taken over; None: they have
            broken off.
        :raise OutboardError: it did not work. ``committed`` says whether the VM is ours: if so it waits for what
            is missing, if not it runs at the source and this QEMU must be ended.
        """
        try:
            if streams is None:
                self._faults = self._serve_faults(None)
            while streams is None or not self._session(streams):
                streams = self._reopen()
        except OutboardError as error:
            if self.committed:
                raise NeedsRecoveryError(
                    f"{self._guest.name} runs here, and {self._memory.residency.count(Where.PEER)} of its pages "
                    f"are still at {self._source}: {error}"
                ) from error
            raise
        finally:
            for worker in (self._faults, self._rebuilding):
                if worker is not None:
                    worker.end()

    def _rebuild(self) -> None:
        """Begin to rebuild what large mappings the source had."""
        if self._rebuilding is None and self._large.needed:
            self._rebuilding = Worker("outboard-large", self._large.serve)

    def _serve_faults(self, channel: Channel | None) -> Worker:
        def serve(link: socket.socket) -> None:
            PeerFaultServer(self._memory, PeerStore(channel), self._counters, link).serve()

        return Worker("outboard-faults", serve, urgent=True)

    def _session(self, streams: dict[str, Channel]) -> bool:
        """Serve until no page is missing, or, once the VM is ours, until the streams break off; whether it is whole."""
        with contextlib.ExitStack() as session:
            for channel in streams.values():
                session.callback(channel.close)
            try:
                self._serve(streams, session)
            except UnreachableError:
                if self.committed and pidfd.alive(self._guest.pid):
                    return False
                raise
        return True

    def _serve(self, streams: dict[str, Channel], session: contextlib.ExitStack) -> None:
        if self._faults is not None:
            # So far it has answered what needs no peer.
            self._faults.end()
        faults = self._faults = self._serve_faults(streams["urgent"])

        def receive_bulk(channel: Channel, link: socket.socket) -> None:
            BulkReceiver(self._memory, channel, faults.link, link, DiskStore(self._images)).serve()

        bulk = []
        for channel in messages.bulk_of(streams):
            bulk.append(Worker("outboard-place", functools.partial(receive_bulk, channel)))
            session.callback(bulk[-1].end)
        control = Conversation(streams["control"])
        # On this stream alone: the others belong to the workers from the fork on.
        control.send(messages.Welcome())
        self._sets = {name: PageSet(self._guest.pages) for name in (messages.FORGET, messages.LIVE, messages.LARGE)}
        self._live, self._all_sent, self._passed = None, False, [0] * len(bulk)
        if self.committed:
            here = ~self._memory.residency.pages_at(Where.PEER)
            control.send_pages(messages.HAVE, here, messages.Have())
            faults.tell(b"open")
            self._memory.wake_all()
            self._rebuild()
        try:
            # QEMU's main loop loads the devices, and the guest stands still meanwhile.
            with sched.favoured([self._guest.emulator_thread()]):
                self._attend(control, faults, bulk, messages.bulk_of(streams), session)
            self._settle(control, faults)
        except OutboardError as error:
            with contextlib.suppress(OutboardError):
                control.send(messages.Failed(why=str(error), exit_code=error.exit_code))
            raise

    def _attend(
        self,
        control: Conversation,
        faults: Worker,
        bulk: list[Worker],
        channels: list[Channel],
        session: contextlib.ExitStack,
    ) -> None:
        """Do what the source says until no page is missing."""

        def take_frames() -> None:
            while True:
                self._take(control.receive(_STEP_S), control, faults, await_barrier)
                if not control.channel.pending():
                    return

        def hear(stream: int) -> None:
            report = bulk[stream].hear(0)
            if report is None:
                return
            match messages.decode(report):
                case messages.Barrier(number):
                    before = min(self._passed)
                    self._passed[stream] = number
                    if min(self._passed) > before:
                        control.send(messages.BarrierPassed(min(self._passed)))
                case _:
                    # It has done its work and ends; from now on it is silent.
                    speakers.pop(bulk[stream].fileno())
                    at_work.discard(stream)
                    self._all_sent = not at_work

        def await_barrier(number: int) -> None:
            begun = time.monotonic()
            while min(self._passed) < number:
                fds = {bulk[stream].fileno(): stream for stream in at_work}
                for fd in select.select(list(fds), [], [], _LOOK_S)[0]:
                    hear(fds[fd])
                # All of a guest may be on its way in the pause.
                silent = min(tcp_info(channel.socket).silent_s for channel in channels)
                if min(silent, time.monotonic() - begun) > _STEP_S:
                    raise PeerError(f"a barrier did not pass, and no page came for {_STEP_S:.0f} s")

        def mourn() -> None:
            raise OutboardError(f"QEMU of {self._guest.name}, process {self._guest.pid}, has ended at the destination")

        at_work = set(range(len(bulk)))
        vmm = pidfd.open(self._guest.pid)
        session.callback(pidfd.close, vmm)
        speakers: dict[int, Callable[[], object]] = {
            vmm: mourn,
            control.channel.fileno(): take_frames,
            **{worker.fileno(): functools.partial(hear, stream) for stream, worker in enumerate(bulk)},
            faults.fileno(): lambda: faults.hear(0),
        }
        while not self._complete():
            for fd in select.select(list(speakers), [], [], _TICK_S if self._all_sent else None)[0]:
                if fd in speakers:
                    speakers[fd]()

    def _complete(self) -> bool:
        return (
            self._all_sent
            and self.committed
            and self._live is not None
            and not self._memory.residency.any_at(Where.PEER, self._live)
        )

    def _take(
        self,
        frame: Frame,
        control: Conversation,
        faults: Worker,
        await_barrier: Callable[[int], None],
    ) -> None:
        if frame.kind is Kind.STREAM and self._arrival is not None:
            if len(frame.payload):
                self._arrival.feed(frame.payload)
            else:
                self._arrival.finish(_STEP_S)
                control.send(messages.Loaded())
            return
        if frame.kind is Kind.PAGESET:
            self._take_part(control.channel.pageset(frame))
            return
        if frame.kind is not Kind.MESSAGE:
            raise PeerError(f"a {frame.kind.name} frame on the control stream")
        match messages.decode(frame.payload):
            case messages.Final(barrier):
                await_barrier(barrier)
                faults.tell(b"open")
                control.send(messages.Settled())
            case messages.Forget():
                self._memory.forget(self._sets[messages.FORGET])
                self._sets[messages.FORGET] = PageSet(self._guest.pages)
            case messages.Live():
                self._live = self._sets[messages.LIVE]
                self._memory.note_zero_set(~self._live)
            case messages.Large(early):
                self._large.want(self._sets[messages.LARGE])
                if early:
                    self._rebuild()
            case messages.Digests():
                self._send_digests(control)
            case messages.Images(nonce):
                seen = ["" if file is None else sample(file, nonce) for file in self._images]
                control.send(messages.ImagesSeen(seen))
            case messages.Commit():
                self._run(control)
            case other:
                raise PeerError(f"a {type(other).__name__} message on the control stream")

    def _take_part(self, part: PageSetPart) -> None:
        pages = self._sets.get(part.name)
        if pages is None or self._live is not None:
            raise PeerError(f"a page set named {part.name} came where none is due")
        at = part.first // 8
        pages.bits()[at : at + part.bits.size] = part.bits

    def _run(self, control: Conversation) -> None:
        if self._arrival is None or self.committed:
            raise PeerError("a commit came for a VM that is ours already")
        self._mapped_before_resume = self._memory.residency.count(Where.RESIDENT)
        self._memory.run()
        if not self._commit():
            raise OutboardError(f"{self._source} has taken {self._guest.name} back: its commit came too late")
        self.committed = True
        if self._running:
            self._arrival.resume(_STEP_S)
        try:
            control.send(messages.Resumed())
        finally:
            # The guest runs, whether or not the source is there to hear of it.
            self._arrival.announce()
            self._rebuild()

    def _send_digests(self, control: Conversation) -> None:
        """Digest what has arrived, once all has: the guest stands still."""
        if self._live is None:
            raise PeerError("digests were asked for before the live pages were named")
        deadline = time.monotonic() + _STEP_S
        while self._memory.residency.any_at(Where.PEER, self._live):
            if time.monotonic() > deadline:
                raise PeerError(f"pages are missing {_STEP_S:.0f} s after all were said to have been sent")
            time.sleep(_TICK_S)
        octets = memoryview(digests(self._guest, self._live).astype("<u8").tobytes())
        for at in range(0, len(octets), _DIGEST_PART):
            control.send_stream(octets[at : at + _DIGEST_PART])
        control.send(messages.Digests())

    def _settle(self, control: Conversation, faults: Worker) -> None:
        """Nothing is missing: give the memory back to QEMU whole, and say so."""
        if self._rebuilding is not None:
            # What it has not done is done here.
            with contextlib.suppress(OutboardError):
                self._rebuilding.tell(b"stop")
            self._rebuilding.join()
        faults.tell(b"stop")
        faults.join()
        if self._memory.unit > 1:
            self._large.finish()
        self._memory.release()
        served = self._counters.statistics()
        arrived = messages.Arrived(
            remote_faults=served.remote,
            zero_faults=served.zero,
            minor_faults=served.minor,
            raced_faults=served.raced,
            fault_p50_us=served.latencies.percentile_us(0.5),
            fault_p99_us=served.latencies.percentile_us(0.99),
            mapped_before_resume=self._mapped_before_resume,
            loading_faults=served.loading,
            device_faults=served.device,
            device_fault_pages=list(served.device_pages),
        )
        self._note_arrived(messages.encode(arrived))
        # A source that does not hear it asks the agent.
        with contextlib.suppress(UnreachableError):
            control.send(arrived)
        if self._large.wanted:
            # Whether or not the source is there to hear of it; the VM may be ended by its owner by now.
            with contextlib.suppress(UnreachableError, KernelError):
                control.send(messages.Rebuilt(large_mappings=self._large.count()))
        # Whoever closes first is believed to have broken off: let it be the source, when it has read this.
        with contextlib.suppress(UnreachableError):
            control.receive(_STEP_S)
