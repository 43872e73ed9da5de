"""Which codec the bulk uses, by what it gains on this guest's pages over this link.

A batch costs the wire its packed bytes, and the processor the reading, the packing and the sending (TLS, copies);
while the kernel sends one batch the next is packed, so that the longer of the two counts. For each codec, per byte of
content:

    time = max(ratio / wire, (reading + packing + ratio * sending) / share)

with the ratio of packed to unpacked bytes and the processor's time to read, pack and send a byte as they were last seen
on this guest's pages, the wire's rate as the pace of the bulk knows it or the user limits it, and the share of a
processor that this process gets while it works: others may want it too. The codec of the least time is taken; among
those within 3 % of it the one that takes the least of the processor, and another than before only where it is better by
5 %. Not packing is one of them, with ratio 1 and no time.

Ratios and speeds come from probes: eight pages of a batch are packed by every codec, the cheaper ones alone where they
gain nothing, as often as that takes no more than a hundredth of the time, and up to eight times less often for as long
as it is best not to pack. Each batch that is packed tells more; one that comes out no smaller than 0.97 of itself goes
as it is. Until the wire's rate is known nothing is packed: packing would hide it. While packing takes longer than the
wire, the wire's rate stays as it was last seen.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.wire.codecs import CODERS, LZ4, NONE, ZSTD, Coder, Octets

SMALLER = 0.97
"""A batch that is not smaller than this share of itself goes as it is."""
_SAMPLE = 8
"""Pages to probe: fewer would be unfair to Zstandard, which begins slowly."""
_PROBES = 100
"""One part in so many of the time goes to probes."""
_SELDOM = 8
_ALIKE, _BETTER = 1.03, 0.95
_NEW_PROBE, _NEW_BATCH = 0.5, 0.125
"""How much of an estimate comes from the newest probe, or batch."""
_SENDING_NS, _READING_NS = 0.5, 0.3
"""What sending and reading a byte are taken to cost until it has been seen."""
_REMEMBER = 1 - 1 / 128
"""What of the share's sums stays with each batch: a turn of the scheduler's may be many batches long."""
_TELLING = 64 * 1024
"""Bytes: of fewer a call costs more than they do."""
_WIRE_BOUND = 2.0


class Compress(Enum):
    """What the user asks for; the value is that of ``--compress``."""

    AUTO = "auto"
    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"


class _Estimate:
    """Of one codec: the ratio, and the processor's nanoseconds for each byte of content."""

    def __init__(self) -> None:
        self.known = False
        self.ratio, self.ns = 1.0, 0.0

    def note(self, ratio: float, ns: float, weight: float) -> None:
        weight = weight if self.known else 1.0
        self.ratio += weight * (ratio - self.ratio)
        self.ns += weight * (ns - self.ns)
        self.known = True


class Choice:
    """Chooses, batch by batch.

    :param clock: nanoseconds, monotonic. :param processor: nanoseconds of processor time of this thread.

    ``spent_ns`` is what packing has taken of the processor so far.

    Synchronization: one thread.
    """

    def __init__(self, compress: Compress, clock: Callable[[], int], processor: Callable[[], int]) -> None:
        self._fixed = {Compress.NONE: NONE, Compress.LZ4: LZ4, Compress.ZSTD: ZSTD[0]}.get(compress)
        self.enabled = compress is not Compress.NONE
        self._clock, self._processor = clock, processor
        self._estimates = {coder: _Estimate() for coder in CODERS}
        self._estimates[NONE].known = True
        self._now = self._fixed or NONE
        self._wire: float | None = None
        self._sending, self._reading = _SENDING_NS, _READING_NS
        self._used, self._took = 1.0, 1.0
        self._probe_at, self._wait = 0, 1
        self.spent_ns = 0

    def note_wire(self, rate: float | None) -> None:
        """The wire carries ``rate`` bytes/s; None: not known yet."""
        self._wire = rate

    def note_sending(self, octets: int, ns: int) -> None:
        """Sending ``octets`` took so much of the processor."""
        if octets >= _TELLING:
            self._sending += _NEW_BATCH * (ns / octets - self._sending)

    def note_work(self, octets: int, took_ns: int, used_ns: int, packing_ns: int) -> None:
        """A batch of so much content was read and packed.

        :param took_ns: by the clock; :param used_ns: of the processor; :param packing_ns: of these, to pack.
        """
        self._used = _REMEMBER * self._used + used_ns
        self._took = _REMEMBER * self._took + max(took_ns, used_ns)
        if octets >= _TELLING:
            self._reading += _NEW_BATCH * ((used_ns - packing_ns) / octets - self._reading)

    @property
    def share(self) -> float:
        """How much of a processor this process gets when it has something to do."""
        return self._used / self._took

    @property
    def waits(self) -> bool:
        """Whether it waits for the wire most of its time, so that the processor has some to spare."""
        return self._wire is not None and 1e9 / self._wire > _WIRE_BOUND * self._time(NONE, wire=0.0)

    @property
    def saving_pays(self) -> bool:
        """Whether bytes on the wire are worth some of the processor."""
        return self.enabled if self._fixed is not None else self.waits

    @property
    def saving_may_pay(self) -> bool:
        """Whether :attr:`saving_pays`, or that is not known yet."""
        return self.saving_pays or (self.enabled and self._fixed is None and self._wire is None)

    @property
    def whole_ns(self) -> float:
        """What a page takes of the wire as it is; 0 while that is not known."""
        return 0.0 if self._wire is None else PAGE_SIZE * 1e9 / self._wire

    @property
    def packing(self) -> bool:
        """Whether batches are packed now."""
        return self._now is not NONE

    @property
    def ratio(self) -> float:
        """What pages with content come to now, as a share of themselves."""
        return min(1.0, self._estimates[self._now].ratio)

    def packs_to(self, pages: NDArray[np.uint8]) -> float:
        """What these pages would come to now, as a share of themselves; by a few of them.

        :param pages: a row each.
        """
        if self._now is NONE:
            return 1.0
        sample = pages[_spread(len(pages))].reshape(-1)
        return min(1.0, len(self._timed(self._now, sample, 0.0)) / sample.size)

    def pack(self, content: NDArray[np.uint8]) -> tuple[Coder, Octets]:
        """Pack the content of a batch by whatever is best.

        :param content: whole pages.
        :return: the codec that it went by, and what came out.
        """
        if not content.size:
            return NONE, b""
        coder = self._choose(content)
        if coder is NONE:
            return NONE, content.data
        packed = self._timed(coder, content, _NEW_BATCH)
        return (coder, packed) if len(packed) < SMALLER * content.size else (NONE, content.data)

    def _choose(self, content: NDArray[np.uint8]) -> Coder:
        if self._fixed is not None:
            return self._fixed
        if self._clock() >= self._probe_at:
            self._probe(content)
        if self._wire is None:
            return NONE
        times = {coder: self._time(coder, 1e9 / self._wire) for coder in CODERS if self._estimates[coder].known}
        best = min(times.values())
        coder = next(coder for coder, time in times.items() if time <= _ALIKE * best)
        if times[coder] < _BETTER * times[self._now]:
            self._now = coder
        return self._now

    def _time(self, coder: Coder, wire: float) -> float:
        """Nanoseconds for each byte of content; ``wire``: what a byte takes there."""
        seen = self._estimates[coder]
        return max(seen.ratio * wire, (self._reading + seen.ns + seen.ratio * self._sending) / self.share)

    def _probe(self, content: NDArray[np.uint8]) -> None:
        before = self.spent_ns
        pages = content.reshape(-1, PAGE_SIZE)
        sample = pages[_spread(len(pages))].reshape(-1)
        for index, coder in enumerate(CODERS[1:]):
            packed = self._timed(coder, sample, _NEW_PROBE)
            if index and len(packed) >= SMALLER * sample.size:
                # The others try harder, and would find as little.
                for other in CODERS[index + 2 :]:
                    self._estimates[other].note(1.0, self._estimates[coder].ns, _NEW_PROBE)
                break
        self._wait = min(2 * self._wait, _SELDOM) if self._wire is not None and self._now is NONE else 1
        self._probe_at = self._clock() + int((self.spent_ns - before) / self.share * _PROBES * self._wait)

    def _timed(self, coder: Coder, content: NDArray[np.uint8], weight: float) -> Octets:
        began = self._processor()
        packed = coder.pack(content.data)
        took = self._processor() - began
        self.spent_ns += took
        # A handful of pages would tell more of what a call costs than of what a byte does.
        if content.size >= _SAMPLE * PAGE_SIZE:
            self._estimates[coder].note(len(packed) / content.size, took / content.size, weight)
        return packed


def _spread(pages: int) -> NDArray[np.intp]:
    """At most _SAMPLE of so many pages, far from one another."""
    return np.unique(np.linspace(0, pages - 1, min(pages, _SAMPLE)).astype(np.intp))
