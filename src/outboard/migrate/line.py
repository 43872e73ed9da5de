"""The line to the destination: its agent, the streams to its engine, and the processes that send on them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from outboard.errors import OutboardError, PeerError
from outboard.migrate import messages
from outboard.migrate.codec import Compress
from outboard.migrate.conversation import Conversation
from outboard.migrate.desk import Destination
from outboard.migrate.messages import Message
from outboard.migrate.outbox import Outbox, Share
from outboard.migrate.references import References
from outboard.migrate.sending import Answerer, BulkSender, Done, Say, Send, decode_done, encode_order
from outboard.migrate.steering import STEP_S, Speakers, Steering
from outboard.migrate.worker import Worker
from outboard.pages.labels import put
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest
from outboard.wire import tls
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind

_CALL_S = 5.0
"""The longest that a host may take to let us in when it is called again."""

M = TypeVar("M", bound=Message)


class Line:
    """The source's end of everything that goes between the two hosts.

    :param identity: the directory of this host's TLS identity.
    :param ready: called when the destination is ready for pages the first time.

    ``digests`` takes in what the destination sends of them, once it is not None.

    Synchronization: one thread; it forks workers, and so must be the only one when the streams open.
    """

    def __init__(
        self,
        migration: str,
        guest: Guest,
        outbox: Outbox,
        destination: Destination,
        identity: Path,
        steering: Steering,
        ready: Callable[[], None],
        compress: Compress,
        references: References,
    ) -> None:
        self.migration, self.destination = migration, destination
        self.digests: bytearray | None = None
        self.bulk_streams = 1
        """How many there were when the streams were opened last."""
        self._guest, self._outbox, self._identity, self._steering = guest, outbox, identity, steering
        self._ready, self._compress, self._references = ready, compress, references
        self._agent: Channel | None = None
        self._streams: dict[str, Channel] = {}
        self._control: Conversation | None = None
        self._control_bytes = 0
        self._bulk: list[Worker] = []
        self._answerer: Worker | None = None
        self._inbox: list[Message] = []
        self._done: dict[Worker, list[Done]] = {}
        self._ordered = 0
        self._barriers = self._passed = 0
        steering.listen(self._speakers)

    @property
    def is_open(self) -> bool:
        """Whether the destination is there to be sent pages."""
        return self._control is not None

    @property
    def control(self) -> Conversation:
        """The stream of messages; only while the line is open."""
        if self._control is None:
            raise AssertionError("nobody is there to be told anything")
        return self._control

    @property
    def control_bytes(self) -> int:
        """What has gone out on control streams."""
        return self._control_bytes + (0 if self._control is None else self._control.channel.bytes_sent)

    def request(self, prepare: messages.Prepare) -> None:
        """Ask the destination's agent for a QEMU; the line opens by itself when that is there.

        :raise UnreachableError: nobody answers. :raise NotAuthorisedError: it is not who was meant.
        """
        target = self.destination
        self._agent = tls.connect(target.address, target.port, self._identity, target.name, STEP_S)
        self._agent.send_message(messages.encode(prepare))

    def call_again(self) -> Message:
        """Ask the destination's agent what has become of a migration that broke off: Prepared, Arrived or Refused.

        :raise UnreachableError: nobody answers.
        """
        target = self.destination
        with tls.connect(target.address, target.port, self._identity, target.name, _CALL_S) as agent:
            agent.send_message(messages.encode(messages.Recover(migration=self.migration)))
            return messages.decode(agent.receive(STEP_S).payload)

    def open_again(self, prepared: messages.Prepared) -> PageSet:
        """Open new streams; which pages the destination has.

        :raise OutboardError: it did not work, and the line is closed as it was.
        """
        streams = self._open_streams(prepared)
        try:
            messages.expect(streams["control"].receive(STEP_S).payload, messages.Welcome)
            have = self._receive_have(streams["control"])
        except OutboardError:
            for channel in streams.values():
                channel.close()
            raise
        self._streams = streams
        self._outbox.sent[:] = 0
        put(self._outbox.sent, have, 1)
        self._start()
        return have

    def _receive_have(self, control: Channel) -> PageSet:
        have = PageSet(self._outbox.pages)
        while True:
            frame = control.receive(STEP_S)
            if frame.kind is not Kind.PAGESET:
                messages.expect(frame.payload, messages.Have)
                return have
            part = control.pageset(frame)
            if part.name != messages.HAVE:
                raise PeerError(f"a page set named {part.name} came where none is due")
            have.bits()[part.first // 8 :][: part.bits.size] = part.bits

    def order(self, order: Send) -> None:
        """Have the bulk send."""
        if not self._bulk:
            raise AssertionError("orders need a bulk sender")
        self._ordered += 1
        for worker in self._bulk:
            worker.tell(encode_order(order))

    def say(self, message: Message) -> None:
        """Put a message on each bulk stream, behind all that was ordered."""
        for worker in self._bulk:
            worker.tell(encode_order(Say(messages.encode(message))))

    def barrier(self) -> int:
        """Put a barrier on the bulk streams; its number."""
        self._barriers += 1
        self.say(messages.Barrier(self._barriers))
        return self._barriers

    def await_sent(self, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Wait until all orders are done, and do something else at each turn; the sum of what they did.

        Of the time, what the slowest stream took.
        """

        def ready() -> bool:
            meanwhile()
            return all(len(done) >= self._ordered for done in self._done.values())

        self._steering.until(ready, None)
        streams, self._ordered = list(self._done.values()), 0
        self._done = {worker: [] for worker in self._bulk}
        every = [one for done in streams for one in done]
        return Done(
            sum(one.octets for one in every),
            sum(one.content for one in every),
            max((sum(one.seconds for one in done) for done in streams), default=0.0),
            all(one.complete for one in every),
        )

    def await_placed(self) -> None:
        """Wait until all that the bulk has sent is in the destination's memory."""
        number = self.barrier()
        self._steering.until(lambda: self._passed >= number, STEP_S)

    def await_message(self, kind: type[M], timeout: float | None = STEP_S) -> M:
        """The next message, which must be a ``kind``."""
        self._steering.until(lambda: bool(self._inbox), timeout)
        message = self._inbox.pop(0)
        if not isinstance(message, kind):
            raise PeerError(f"the destination sent {type(message).__name__} where {kind.__name__} was due")
        return message

    def hang_up(self) -> None:
        """End the senders and close the streams; nothing that they had promised holds any more. Idempotent."""
        self._control_bytes = self.control_bytes
        self.end_senders()
        for channel in self._streams.values():
            channel.close()
        if self._agent is not None:
            self._agent.close()
        self._answerer = self._control = self._agent = None
        self._bulk, self._streams = [], {}
        self._inbox, self._done, self._ordered = [], {}, 0
        self._barriers = self._passed = 0

    def end_senders(self) -> None:
        """Send no more pages. Idempotent."""
        for worker in self._workers:
            worker.end()

    @property
    def _workers(self) -> list[Worker]:
        return self._bulk + ([] if self._answerer is None else [self._answerer])

    def _speakers(self) -> Speakers:
        speakers: dict[int, Callable[[], None]] = {}
        if self._control is not None:
            speakers[self._control.channel.fileno()] = self._take_frame
        elif self._streams:
            speakers[self._streams["control"].fileno()] = self._take_welcome
        elif self._agent is not None:
            speakers[self._agent.fileno()] = self._take_prepared
        for worker in self._workers:
            speakers[worker.fileno()] = lambda worker=worker: self._take_report(worker)  # type: ignore[misc]
        return speakers

    def _take_prepared(self) -> None:
        """The destination listens: open the streams while its QEMU starts."""
        if self._agent is not None:
            self._streams = self._open_streams(messages.expect(self._agent.receive(STEP_S).payload, messages.Prepared))

    def _take_welcome(self) -> None:
        messages.expect(self._streams["control"].receive(STEP_S).payload, messages.Welcome)
        self._start()
        self._ready()

    def _open_streams(self, prepared: messages.Prepared) -> dict[str, Channel]:
        target = self.destination

        def open_one(role: str) -> Channel:
            channel = tls.connect(target.address, prepared.port, self._identity, target.name, STEP_S, self._guest.pages)
            hello = messages.Hello(migration=self.migration, role=role, token=prepared.tokens[role])
            channel.send_message(messages.encode(hello))
            return channel

        roles = messages.roles(len(messages.bulk_of(prepared.tokens)))
        if set(roles) != set(prepared.tokens):
            raise PeerError(f"{target.name} gave tokens for the streams {', '.join(sorted(prepared.tokens))}")
        # Its threads have ended before the workers are forked.
        with ThreadPoolExecutor(len(roles)) as pool:
            opening = {role: pool.submit(open_one, role) for role in roles}
        failed = [error for one in opening.values() if (error := one.exception()) is not None]
        if not failed:
            return {role: one.result() for role, one in opening.items()}
        for one in opening.values():
            if one.exception() is None:
                one.result().close()
        raise failed[0]

    def _start(self) -> None:
        guest, outbox, streams = self._guest, self._outbox, self._streams
        self._answerer = Worker(
            "outboard-answer", lambda _: Answerer(guest, outbox, streams["urgent"]).serve(), urgent=True
        )
        bulk, compress, references = messages.bulk_of(streams), self._compress, self._references
        self.bulk_streams = len(bulk)

        def send(link: socket.socket, number: int) -> None:
            BulkSender(guest, outbox, bulk[number], link, compress, Share(number, len(bulk)), references).serve()

        self._bulk = [
            Worker("outboard-bulk", lambda link, number=number: send(link, number))  # type: ignore[misc]
            for number in range(len(bulk))
        ]
        self._done = {worker: [] for worker in self._bulk}
        self._control = Conversation(streams["control"])

    def _take_frame(self) -> None:
        channel = self.control.channel
        while True:
            frame = channel.receive(STEP_S)
            if frame.kind is Kind.STREAM and self.digests is not None:
                if len(self.digests) + len(frame.payload) > 8 * self._outbox.pages:
                    raise PeerError("the destination sent more digests than the guest has pages")
                self.digests += frame.payload
            elif frame.kind is Kind.MESSAGE:
                message = messages.decode(frame.payload)
                if isinstance(message, messages.BarrierPassed):
                    self._passed = message.number
                elif isinstance(message, messages.ImagesSeen):
                    self._references.answered(message)
                else:
                    self._inbox.append(message)
            else:
                raise PeerError(f"a {frame.kind.name} frame came where only messages are due")
            if not channel.pending():
                return

    def _take_report(self, worker: Worker) -> None:
        report = worker.hear(0)
        if report is not None and worker in self._done:
            self._done[worker].append(decode_done.decode(report))
