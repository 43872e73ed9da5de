"""What the source still has to send, in memory shared by the engine's main process and its two senders.

``rank[page]`` says when a page's turn is (0 first, NEVER not at all) and ``sent[page]`` whether somebody has taken it
upon himself to send it. The bulk walks the ranks; the answerer of faults takes single pages out of turn. Whoever claims
``sent`` sends the page, so it crosses once, and once more only if it was written after that.

Where the memory is in large pages, those go whole the first time, when the first of their small pages has its turn;
their first page's flag stands for all of them. Afterwards small ones may go again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.migrate.messages import MAX_STREAMS
from outboard.migrate.turns import NEVER, Walk
from outboard.pages import PAGE_SIZE
from outboard.pages.labels import labelled, put
from outboard.pages.pageset import PageSet, Runs
from outboard.pages.shared import claim, claim_one, shared_array
from outboard.wire.codecs import CODERS


@dataclass(frozen=True, slots=True)
class Sent:
    """What has gone out so far: pages by how they went, and bytes on the streams before encryption."""

    data_pages: int
    zero_pages: int
    urgent_pages: int
    bulk_bytes: int
    urgent_bytes: int
    rate: int
    """The pace of the bulk in bytes/s; 0 is unpaced."""
    content: Content

    @property
    def content_bytes(self) -> int:
        """What the pages that have gone out hold, but those of zeros."""
        return PAGE_SIZE * (self.data_pages + self.urgent_pages)


@dataclass(frozen=True, slots=True)
class Content:
    """How the content of pages has gone out on the bulk.

    :ivar packed_bytes: what it was on the wire. :ivar codec_ns: of processor time, spent to make it so.
    :ivar same_pages: that went as references. :ivar changed_pages: that went as what has changed of them.
    :ivar block_pages: that went as blocks of disks. :ivar refused_blocks: of these, that the destination asked for.
    :ivar codec_pages: that went whole, by codec, in the order of wire.codecs.CODERS.
    """

    packed_bytes: int
    codec_ns: int
    same_pages: int
    changed_pages: int
    block_pages: int
    refused_blocks: int
    codec_pages: tuple[int, ...]


class Share:
    """The part of the guest's memory that one of several streams sends: every so-many-th stretch of 2 MiB, which a
    large page never crosses.

    Before the resume a page always goes on the same stream, and so never overtakes what was sent of it before.
    """

    def __init__(self, number: int = 0, of: int = 1) -> None:
        self.number, self.of = number, of


ALL = Share()


class Outbox:
    """The shared arrays of one outgoing migration.

    :param unit: pages that cannot be placed one by one: 1, or those of a large page.
    :param digested: keep the digest of each page as it was sent last.

    Synchronization: made before the senders are forked. The main process ranks pages while the bulk does not walk them.
    """

    _DATA, _ZERO, _URGENT, _BULK_BYTES, _URGENT_BYTES, _LIMIT, _HALT, _RATE = range(8)
    _BUSY, _PACKED, _CODEC_NS, _SAME, _CHANGED, _BLOCK, _REFUSED, _CODECS = range(8, 16)

    def __init__(self, pages: int, *, unit: int = 1, digested: bool = False) -> None:
        self.pages = pages
        self.unit = unit
        self.digests: NDArray[np.uint64] | None = shared_array(pages, np.uint64) if digested else None
        self.rank: NDArray[np.uint8] = shared_array(pages, np.uint8)
        self.rank[:] = NEVER
        self.sent: NDArray[np.uint8] = shared_array(pages, np.uint8)
        # The kernel gives memory to it now, not while the guest stands still.
        self.sent[:] = 0
        # A row for each stream: adding to a number is no single instruction.
        columns = self._CODECS + len(CODERS)
        self._counters: NDArray[np.int64] = shared_array(MAX_STREAMS * columns, np.int64).reshape(MAX_STREAMS, columns)

    def due(self, first: int, count: int, rank: int, share: Share = ALL, *, parts: bool = True) -> Runs:
        """Runs of the pages in ``[first, first + count)`` whose turn ``rank`` is and that nobody has sent.

        :param parts: parts of large pages too; not while others claim those, which takes them a moment.
        """
        return self._walk(first, count, share, parts).runs(rank)

    def ranks_due(self, first: int, count: int, upto: int, share: Share = ALL, *, parts: bool = True) -> list[int]:
        """Which ranks up to ``upto`` have pages due in ``[first, first + count)``, ascending; ``parts`` as in due."""
        return self._walk(first, count, share, parts).ranks(upto)

    def _walk(self, first: int, count: int, share: Share, parts: bool) -> Walk:
        end = min(self.pages, first + count)
        return Walk(self.rank, self.sent, self.unit, first, end, (share.number, share.of), parts)

    def claim(self, first: int, count: int) -> NDArray[np.bool_]:
        """Take it upon oneself to send pages; which of them nobody else has."""
        if self.unit > 1 and count == self.unit and first % self.unit == 0:
            return np.full(count, self.claim_one(first))
        return claim(self.sent, first, count)

    def claim_one(self, page: int) -> bool:
        """Take it upon oneself to send the page, or the large page that it is the first of; whether nobody else has."""
        if not claim_one(self.sent, page):
            return False
        self.sent[page + 1 : page + self.unit] = 1
        return True

    def unsent(self) -> PageSet:
        """The pages that have a turn and were not sent."""
        return self.live() - self.already_sent()

    def live(self) -> PageSet:
        """The pages that have a turn, or had one."""
        return labelled(self.rank, NEVER, otherwise=True)

    def already_sent(self) -> PageSet:
        """The pages that were sent and not taken back."""
        return labelled(self.sent, 0, otherwise=True)

    def again(self, pages: PageSet, rank: int) -> None:
        """Give pages a turn (again): their content has changed since they were sent, or they came to life."""
        put(self.rank, pages, rank)
        put(self.sent, pages, 0)

    def count_bulk(self, data: int, zero: int, octets: int, stream: int = 0) -> None:
        """Note what the bulk sent."""
        self._counters[stream, self._DATA] += data
        self._counters[stream, self._ZERO] += zero
        self._counters[stream, self._BULK_BYTES] += octets

    def count_packed(self, octets: int, coder: int, pages: int, ns: int, stream: int = 0) -> None:
        """Note what the content of a batch has become, by which of CODERS, and the processor time that it took."""
        self._counters[stream, self._PACKED] += octets
        self._counters[stream, self._CODECS + coder] += pages
        self._counters[stream, self._CODEC_NS] += ns

    def count_told(self, same: int, changed: int, stream: int = 0) -> None:
        """Note how many pages went as references, and as what has changed of them."""
        self._counters[stream, self._SAME] += same
        self._counters[stream, self._CHANGED] += changed

    def count_blocks(self, pages: int, refused: int, stream: int = 0) -> None:
        """Note how many pages went as blocks of disks, and how many of those the destination asked for."""
        self._counters[stream, self._BLOCK] += pages
        self._counters[stream, self._REFUSED] += refused

    def count_urgent(self, pages: int, octets: int) -> None:
        """Note what the answerer sent."""
        self._counters[0, self._URGENT] += pages
        self._counters[0, self._URGENT_BYTES] += octets

    def note_rate(self, rate: int, stream: int = 0) -> None:
        """Note a stream's present pace."""
        self._counters[stream, self._RATE] = rate

    def note_busy(self, stream: int, *, busy: bool) -> None:
        """Note whether a stream has something to send."""
        self._counters[stream, self._BUSY] = busy

    @property
    def limit_each(self) -> float | None:
        """What each stream that has something to send may take of the limit."""
        limit = self.limit
        return None if limit is None else limit / max(1, int(self._counters[:, self._BUSY].sum()))

    @property
    def limit(self) -> int | None:
        """The user's bandwidth limit in bytes/s; it may change while the migration runs."""
        return int(self._counters[0, self._LIMIT]) or None

    @limit.setter
    def limit(self, rate: int | None) -> None:
        self._counters[0, self._LIMIT] = rate or 0

    @property
    def halted(self) -> bool:
        """Whether what the bulk sends for want of something better shall stop."""
        return bool(self._counters[0, self._HALT])

    @halted.setter
    def halted(self, stop: bool) -> None:
        self._counters[0, self._HALT] = stop

    def statistics(self) -> Sent:
        """A frozen snapshot."""
        c = self._counters.sum(axis=0).tolist()
        return Sent(
            c[self._DATA],
            c[self._ZERO],
            c[self._URGENT],
            c[self._BULK_BYTES],
            c[self._URGENT_BYTES],
            c[self._RATE],
            Content(
                c[self._PACKED],
                c[self._CODEC_NS],
                c[self._SAME],
                c[self._CHANGED],
                c[self._BLOCK],
                c[self._REFUSED],
                tuple(c[self._CODECS :]),
            ),
        )
