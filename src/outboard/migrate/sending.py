"""The source's two senders: the bulk, in the order of the outbox, and the answerer of the destination's faults.

Both read pages through the guest's files and both are processes of their own, so that an answer never waits for the
bulk; what could still hold it up is a queue in the network, and the bulk is paced so that none builds up.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.linux import tcp
from outboard.migrate import messages, ranking
from outboard.migrate.codec import Compress
from outboard.migrate.outbox import ALL, Outbox, Share
from outboard.migrate.packing import Packer
from outboard.migrate.references import Lookup, References
from outboard.migrate.refining import note_digests
from outboard.migrate.turns import NEVER
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.pageset import PageSet, Runs, chop
from outboard.vmm.guest import Guest
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind
from outboard.wire.pace import LinkEstimate
from outboard.wire.urgent import Answering

_BATCH = 64
"""Pages in one frame: 256 KiB, 2 ms of a gigabit link."""

_AHEAD = 4
"""Frames whose blocks a disk is asked for ahead."""

_PACE_NS = 5_000_000
_SEND_BUFFER = 256 * 1024
"""Bytes the kernel may hold of the bulk: what is in there is ahead of whatever we decide next."""
_STARVED = 32 * 1024
_ANSWER_S = 60.0
"""The longest that the destination may take to say which blocks it could not read."""


class Send(msgspec.Struct, frozen=True, tag="send"):
    """Send what is due in ``[first, first + count)`` up to rank ``upto``; stop after ``seconds`` if given.

    ``paced``: keep the link's queue empty; otherwise as fast as the link goes. ``haltable``: it stops as soon as the
    outbox says ``halted``. ``changes``: what was sent before is what the destination's memory holds, so that what has
    changed of it will do.
    """

    first: int
    count: int
    upto: int
    paced: bool
    seconds: float | None = None
    haltable: bool = False
    changes: bool = False


class Say(msgspec.Struct, frozen=True, tag="say"):
    """Send a message on the bulk stream, behind what was sent before."""

    payload: bytes


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A Send has ended: what it sent and how long it took; ``complete`` is whether nothing was left over.

    ``octets`` on the wire, ``content`` what the pages held, those of zeros nothing.
    """

    octets: int
    content: int
    seconds: float
    complete: bool


encode_order = msgspec.json.encode
_decode_order: msgspec.json.Decoder[Send | Say] = msgspec.json.Decoder(Send | Say)
decode_done: msgspec.json.Decoder[Done] = msgspec.json.Decoder(Done)


def batches(runs: Runs, unit: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Group runs, in order, into lists of at most _BATCH pages; a large page of ``unit`` pages is a list of its own."""
    if unit > 1:
        small: list[list[int]] = []
        for piece in _cut(runs, unit):
            if piece[1] < unit:
                small.append(piece)
                continue
            yield from batches(np.array(small).reshape(-1, 2))
            yield [(piece[0], unit)]
            small = []
        yield from batches(np.array(small).reshape(-1, 2))
        return
    batch: list[tuple[int, int]] = []
    room = _BATCH
    for first, count in chop(runs, _BATCH).tolist():
        while count:
            part = min(count, room)
            batch.append((first, part))
            first, count, room = first + part, count - part, room - part
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def _cut(runs: Runs, unit: int) -> Iterator[list[int]]:
    """Runs, cut at multiples of ``unit``."""
    for first, count in runs.tolist():
        edges = [first, *range((first // unit + 1) * unit, first + count, unit), first + count]
        yield from ([low, high - low] for low, high in pairwise(edges))


class BulkSender:
    """Walks the outbox, on one stream.

    :param share: what this one sends of it. :param references: what may go as a reference to a block of a disk.
    """

    def __init__(
        self,
        guest: Guest,
        outbox: Outbox,
        channel: Channel,
        link: socket.socket,
        compress: Compress = Compress.NONE,
        share: Share = ALL,
        references: References | None = None,
    ) -> None:
        self._guest = guest
        self._outbox = outbox
        self._channel = channel
        self._link = link
        self._share = share
        # A large page is placed whole, and so cannot lack a part.
        by_block = references is not None and references.wanted and outbox.unit == 1
        self._lookup = Lookup(references) if by_block and references is not None else None
        self._packer = Packer(outbox, channel, compress, share, self._lookup)
        self._read: NDArray[np.uint8] = np.empty(max(_BATCH, outbox.unit) * PAGE_SIZE, dtype=np.uint8)
        self._ahead: NDArray[np.uint8] = np.empty(_BATCH * PAGE_SIZE if by_block else 0, dtype=np.uint8)
        self._estimate = LinkEstimate(time.monotonic)
        self._paced_at = 0
        self._paced = False
        channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        channel.take_over()

    def serve(self) -> None:
        """Take orders until the engine ends us."""
        while order := self._link.recv(65536):
            match _decode_order.decode(order):
                case Send() as send:
                    self._link.send(msgspec.json.encode(self._send(send)))
                case Say(payload):
                    self._resolve()
                    self._channel.send_message(payload)

    def _send(self, order: Send) -> Done:
        began = time.monotonic()
        octets, content = self._packer.octets, self._packer.content_bytes
        self._paced = order.paced
        self._outbox.note_busy(self._share.number, busy=True)
        self._pace(time.monotonic_ns(), busy=False)
        complete = self._walk(order, began, self._share)
        if complete and self._share.of > 1 and not order.changes:
            # Whatever arrives second is dropped by now: help the others.
            complete = self._walk(order, began, ALL)
        self._outbox.note_busy(self._share.number, busy=False)
        now = time.monotonic()
        return Done(self._packer.octets - octets, self._packer.content_bytes - content, now - began, complete)

    def _walk(self, order: Send, began: float, share: Share) -> bool:
        if order.haltable and self._outbox.halted:
            return False
        # Parts of large pages go again only before the resume, when nobody else claims any.
        parts = order.changes
        for rank in self._outbox.ranks_due(order.first, order.count, order.upto, share, parts=parts):
            due = self._outbox.due(order.first, order.count, rank, share, parts=parts)
            by_block = rank not in ranking.NOT_SOUGHT
            for batch in self._announced(due) if by_block else batches(due, self._outbox.unit):
                self._send_batch(batch, changes=order.changes, by_block=by_block)
                if self._lookup is not None and self._lookup.due:
                    self._resolve()
                now = time.monotonic_ns()
                if now - self._paced_at > _PACE_NS:
                    self._pace(now)
                if (order.haltable and self._outbox.halted) or (
                    order.seconds is not None and now / 1e9 - began > order.seconds
                ):
                    return False
        return True

    def _announced(self, due: Runs) -> Iterator[list[tuple[int, int]]]:
        """Batches; blocks are asked for some of them ahead, so that sending goes on while a disk is read."""
        waiting: deque[list[tuple[int, int]]] = deque()
        for batch in batches(due, self._outbox.unit):
            if self._lookup is not None and self._lookup.cold:
                # They are read again when they are sent: others may have sent them, or written to them.
                self._lookup.ask_ahead(self._content(batch, self._ahead))
            waiting.append(batch)
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _content(self, runs: list[tuple[int, int]], into: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What pages hold now, read into ``into``."""
        at = 0
        for first, count in runs:
            end = at + count * PAGE_SIZE
            self._guest.memory.read_into(first, into[at:end].data)
            at = end
        return into[:at]

    def _send_batch(self, batch: list[tuple[int, int]], *, changes: bool, by_block: bool) -> None:
        claimed = list(self._claim(batch))
        if claimed:
            self._send_claimed(claimed, changes=changes, by_block=by_block)

    def _resolve(self) -> None:
        """Have the destination say which references it could not follow, and send those pages."""
        if self._lookup is None or not self._lookup.open:
            return
        self._channel.send_message(messages.encode(messages.Resolve()))
        asked = PageSet(self._outbox.pages)
        while (frame := self._channel.receive(_ANSWER_S)).kind is not Kind.MESSAGE:
            if frame.kind is not Kind.REQUEST:
                raise PeerError(f"a {frame.kind.name} frame came back on the bulk stream")
            asked |= PageSet.from_numbers(self._outbox.pages, np.array(self._channel.requested(frame)))
        resolved = messages.expect(frame.payload, messages.Resolved)
        if len(asked) > self._lookup.open:
            raise PeerError(f"the destination asks for {len(asked)} pages of {self._lookup.open} that went as blocks")
        self._lookup.asked(len(asked), resolved.read_ns)
        self._outbox.count_blocks(0, len(asked), self._share.number)
        for batch in batches(asked.runs()):
            self._send_claimed(batch, changes=False, by_block=False)

    def _send_claimed(self, claimed: list[tuple[int, int]], *, changes: bool, by_block: bool) -> None:
        self._packer.begin()
        content = self._content(claimed, self._read)
        zero = zero_pages(content)
        if self._outbox.unit > 1:
            # Of a large page what the guest holds free need not be carried.
            zero |= np.concatenate([self._outbox.rank[first : first + count] == NEVER for first, count in claimed])
        if self._outbox.digests is not None:
            note_digests(self._outbox.digests, claimed, content, zero)
        self._packer.send(claimed, content, zero, changes=changes, by_block=by_block)

    def _claim(self, batch: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for first, count in batch:
            ours = self._outbox.claim(first, count)
            if ours.all():
                yield first, count
            else:
                for low, length in PageSet.from_mask(ours):
                    yield first + low, length

    def _pace(self, now: int, *, busy: bool = True) -> None:
        self._paced_at = now
        info = tcp.tcp_info(self._channel.socket)
        limit = self._outbox.limit_each
        # Where the kernel has had all of it before the next batch is packed, it is not the link that is seen.
        busy = busy and (info.queued_bytes >= _STARVED or not self._packer.choice.packing)
        self._estimate.sample(info.acknowledged_bytes, info.rtt_us, info.min_rtt_us, busy=busy, limit=limit)
        wire = [rate for rate in (limit, self._estimate.carried) if rate]
        self._packer.choice.note_wire(min(wire, default=None))
        rates = [rate for rate in (limit, self._estimate.rate if self._paced else None) if rate]
        rate = min(rates, default=None)
        tcp.set_pacing_rate(self._channel.socket, rate)
        self._outbox.note_rate(int(rate or 0), self._share.number)


class Answerer:
    """Answers the destination's page requests, each page at once and alone."""

    def __init__(self, guest: Guest, outbox: Outbox, channel: Channel) -> None:
        self._guest = guest
        self._outbox = outbox
        self._stream = Answering(channel)

    def serve(self) -> None:
        """Answer until the stream ends.

        :raise PeerError: the destination sent something that is no request.
        """
        outbox, stream, memory = self._outbox, self._stream, self._guest.memory
        while True:
            for page in stream.requests():
                # What is taken is on its way already: the bulk had it before the request came.
                if outbox.unit > 1:
                    self._answer_whole(page // outbox.unit * outbox.unit)
                elif outbox.claim_one(page):
                    memory.read_into(page, stream.page)
                    outbox.count_urgent(1, stream.answer(page))

    def _answer_whole(self, first: int) -> None:
        outbox = self._outbox
        if outbox.claim_one(first):
            content: NDArray[np.uint8] = np.empty(outbox.unit * PAGE_SIZE, dtype=np.uint8)
            self._guest.memory.read_into(first, content.data)
            zero = zero_pages(content)
            full = content.reshape(-1, PAGE_SIZE)[~zero].reshape(-1)
            outbox.count_urgent(outbox.unit, self._stream.answer_whole(first, zero, full))
