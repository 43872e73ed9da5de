"""Which codec the bulk uses, by what it gains on this guest's pages over this link.

A batch costs the wire its packed bytes, and the processor the packing and the sending (TLS, copies); while the kernel
sends one batch the next is packed, so that the longer of the two counts. For each codec, per byte of content:

    time = max(ratio / wire, 1 / speed + ratio * sending)

with the ratio of packed to unpacked bytes and the speed of packing as they were last seen on this guest's pages, the
wire's rate as the pace of the bulk knows it or the user limits it, and the processor's time to send a byte. The codec
of the least time is taken; among those within 3 % of it the one that takes the least of the processor, and another than
before only where it is better by 5 %. Not packing is one of them, with ratio 1 and no time.

The speed is by the clock: a processor that others want too packs more slowly. Ratios and speeds come from probes: eight
pages of a batch are packed by every codec, as often as that takes no more than a fiftieth of the time, and ten times
less often where no ratio whatever could pay. Each batch that is packed tells more; one that comes out no smaller than
0.97 of itself goes as it is. Until the wire's rate is known nothing is packed: packing would hide it. While packing
takes longer than the wire, the wire's rate stays as it was last seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from outboard.pages import PAGE_SIZE
from outboard.wire.codecs import CODERS, LZ4, NONE, ZSTD, Coder, Octets

SMALLER = 0.97
"""A batch that is not smaller than this share of itself goes as it is."""
_SAMPLE = 8
"""Pages to probe: fewer would be unfair to Zstandard, which begins slowly."""
_PROBES = 50
"""One part in so many of the time goes to probes."""
_SELDOM = 10
_SPIKE = 2.0
_ALIKE, _BETTER = 1.03, 0.95
_NEW_PROBE, _NEW_BATCH = 0.5, 0.125
"""How much of an estimate comes from the newest probe, or batch."""
_SENDING_NS = 0.5
"""What sending a byte is taken to cost until it has been seen."""
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
    """Of one codec: the ratio, and nanoseconds for each byte of content."""

    def __init__(self) -> None:
        self.known = False
        self.ratio, self.ns = 1.0, 0.0

    def note(self, ratio: float, ns: float, weight: float) -> None:
        weight = weight if self.known else 1.0
        if self.known:
            # The processor may have been somebody else's for a while; if it stays so, the next ones will tell.
            ns = min(ns, _SPIKE * self.ns)
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
        self._sending = _SENDING_NS
        self._probe_at = 0
        self.spent_ns = 0

    def note_wire(self, rate: float | None) -> None:
        """The wire carries ``rate`` bytes/s; None: not known yet."""
        self._wire = rate

    def note_sending(self, octets: int, ns: int) -> None:
        """Sending ``octets`` took so much of the processor."""
        if octets >= _TELLING:
            self._sending += _NEW_BATCH * (ns / octets - self._sending)

    @property
    def saving_pays(self) -> bool:
        """Whether bytes on the wire are worth some of the processor: it waits for the wire most of its time."""
        if self._fixed is not None:
            return self.enabled
        return self._wire is not None and 1e9 / self._wire > _WIRE_BOUND * self._sending

    @property
    def saving_may_pay(self) -> bool:
        """Whether :attr:`saving_pays`, or that is not known yet."""
        return self.saving_pays or (self.enabled and self._fixed is None and self._wire is None)

    @property
    def packing(self) -> bool:
        """Whether batches are packed now."""
        return self._now is not NONE

    @property
    def ratio(self) -> float:
        """What pages with content come to now, as a share of themselves."""
        return min(1.0, self._estimates[self._now].ratio)

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
        times = {coder: self._time(coder) for coder in CODERS if self._estimates[coder].known}
        best = min(times.values())
        coder = next(coder for coder, time in times.items() if time <= _ALIKE * best)
        if times[coder] < _BETTER * times[self._now]:
            self._now = coder
        return self._now

    def _time(self, coder: Coder) -> float:
        """Nanoseconds for each byte of content."""
        seen = self._estimates[coder]
        wire = 0.0 if self._wire is None else 1e9 / self._wire
        return max(seen.ratio * wire, seen.ns + seen.ratio * self._sending)

    def _probe(self, content: NDArray[np.uint8]) -> None:
        before = self.spent_ns
        pages = content.reshape(-1, PAGE_SIZE)
        sample = pages[_spread(len(pages))].reshape(-1)
        for coder in _packers():
            self._timed(coder, sample, _NEW_PROBE)
        fastest = min(self._estimates[coder].ns for coder in _packers())
        hopeless = self._wire is not None and fastest >= self._time(NONE)
        self._probe_at = self._clock() + (self.spent_ns - before) * _PROBES * (_SELDOM if hopeless else 1)

    def _timed(self, coder: Coder, content: NDArray[np.uint8], weight: float) -> Octets:
        began, used = self._clock(), self._processor()
        packed = coder.pack(content.data)
        self.spent_ns += self._processor() - used
        took = self._clock() - began
        # A handful of pages would tell more of what a call costs than of what a byte does.
        if content.size >= _SAMPLE * PAGE_SIZE:
            self._estimates[coder].note(len(packed) / content.size, took / content.size, weight)
        return packed


def _spread(pages: int) -> NDArray[np.intp]:
    """At most _SAMPLE of so many pages, far from one another."""
    return np.unique(np.linspace(0, pages - 1, min(pages, _SAMPLE)).astype(np.intp))


def _packers() -> Iterable[Coder]:
    return CODERS[1:]
