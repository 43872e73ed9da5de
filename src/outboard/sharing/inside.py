"""Sharing inside large pages: what breaking them would reclaim, and which to break when memory is short.

A large page costs one entry of a TLB where its 512 small pages cost one each, so it is left whole while memory is
plenty, whatever is equal inside it. Its small pages are digested where they are, which breaks nothing. Of a content
that is there n times, s of them outside large pages, sharing frees s - 1 as it is, and n - 1 if all were broken: what
breaking adds is the difference. It counts for each large page by how many of the copies lie in it. Pages of zeros count
whole.

The estimate needs not keep all digests. Contents are sampled, not pages: one content in ``every`` is kept, by bits of
its keyed digest, with all its copies, so that what is said of it is exact, and the sum over the sample times ``every``
is right on average. Its standard error follows from the sample: of contents drawn with probability p, each of which
gives g, the variance is estimated by (1 - p) / p**2 times the sum of the squares of g. Zeros, by far the most frequent
content, are counted all.

Breaking is for when memory is short and only then: :class:`Thresholds` say when that is. The large pages that give
most and are touched least go first. They are rebuilt when memory is plenty again; between the two thresholds nothing is
done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.pages import LARGE, PAGE_SIZE
from outboard.sharing.scan import NO_DIGEST

_CONFIDENT = 1.96
"""Standard errors to either side: 95 %."""
_SMALL_ENTRIES = LARGE - 1
"""TLB entries that a broken large page needs more."""


@dataclass(frozen=True, slots=True)
class Inside:
    """The pages of one guest: their digests, which of those count (``stable``), and which are in large pages.

    All by page; ``large`` in whole blocks.
    """

    digests: NDArray[np.uint64]
    stable: NDArray[np.bool_]
    large: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What breaking every large page would reclaim, in pages; the truth is within ``error`` of it 19 times in 20.

    ``by_guest``: the same for each guest; ``by_block``: for each guest, by block of 512 pages.
    """

    pages: float
    error: float
    by_guest: tuple[float, ...]
    by_block: tuple[NDArray[np.float64], ...]


def estimate(
    guests: Sequence[Inside], of_zeros: np.uint64, every: int = 1, pooled: NDArray[np.uint64] | None = None
) -> Estimate:
    """Estimate what breaking large pages would reclaim.

    :param of_zeros: the digest of a page of zeros. :param every: keep one content in so many; 1 is exact.
    :param pooled: contents that are in the sharing pool already: every copy of one of those is to be gained.
    """
    gains = [np.zeros(guest.digests.size, dtype=np.float64) for guest in guests]
    kept, zeros = [], []
    for guest in guests:
        counts = guest.stable & (guest.digests != NO_DIGEST)
        zero = counts & (guest.digests == of_zeros)
        zeros.append(zero & guest.large)
        # The low bits of a keyed digest are as random as any.
        kept.append(np.flatnonzero(counts & ~zero & (guest.digests % np.uint64(every) == 0)))
    contents = np.concatenate([guest.digests[pages] for guest, pages in zip(guests, kept, strict=True)] or [_NONE])
    inside = np.concatenate([guest.large[pages] for guest, pages in zip(guests, kept, strict=True)] or [_NO])
    kinds, which = np.unique(contents, return_inverse=True)
    in_large = np.bincount(which, weights=inside, minlength=kinds.size)
    outside = np.bincount(which, weights=~inside, minlength=kinds.size)
    there = outside > 0 if pooled is None else (outside > 0) | np.isin(kinds, pooled)
    # The last copy stays somewhere.
    gained = np.where(there, in_large, np.maximum(in_large - 1, 0))
    share = np.divide(gained, in_large, out=np.zeros(kinds.size), where=in_large > 0)
    at = 0
    for gain, pages, zero in zip(gains, kept, zeros, strict=True):
        here = slice(at, at + pages.size)
        gain[pages] = every * share[which[here]] * inside[here]
        gain[zero] = 1
        at += pages.size
    error = _CONFIDENT * math.sqrt(every * (every - 1) * float(np.sum(gained**2)))
    blocks = tuple(by_block(gain) for gain in gains)
    by_guest = tuple(float(gain.sum()) for gain in gains)
    return Estimate(sum(by_guest), error, by_guest, blocks)


_NONE: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
_NO: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)


def by_block(gain: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
    """The sum over each block of 512 pages."""
    padded = np.zeros(-(-gain.size // LARGE) * LARGE)
    padded[: gain.size] = gain
    found: NDArray[np.float64] = padded.reshape(-1, LARGE).sum(axis=1)
    return found


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When large pages are broken, and rebuilt; bytes of available memory, and per cent of stalled time (PSI, some).

    0 is never. ``least``: pages that a large page must give to be broken at all.
    """

    break_below: int = 0
    break_stalled: float = 0.0
    rebuild_above: int = 0
    least: int = 64

    def __post_init__(self) -> None:
        if self.rebuild_above and self.rebuild_above <= self.break_below:
            raise ValueError("large pages are rebuilt with more memory available than they are broken with")


@dataclass(frozen=True, slots=True)
class Pressure:
    """How the host is: ``available`` bytes (MemAvailable), and for how many per cent of time somebody ``stalled``."""

    available: int
    stalled: float = 0.0


def wanted(pressure: Pressure, thresholds: Thresholds, at_once: int = 64 << 20) -> int:
    """Bytes to reclaim by breaking large pages now; 0 without pressure.

    :param at_once: how much is tried where tasks stall though memory is available.
    """
    short = thresholds.break_below - pressure.available
    stalls = thresholds.break_stalled > 0 and pressure.stalled >= thresholds.break_stalled
    return max(short, at_once if stalls else 0, 0)


def plenty(pressure: Pressure, thresholds: Thresholds) -> bool:
    """Whether broken large pages may be rebuilt."""
    stalls = thresholds.break_stalled > 0 and pressure.stalled >= thresholds.break_stalled
    return thresholds.rebuild_above > 0 and pressure.available > thresholds.rebuild_above and not stalls


def to_break(
    guests: Sequence[Inside],
    of_zeros: np.uint64,
    pooled: NDArray[np.uint64],
    heat: Sequence[NDArray[np.float64]],
    reclaim: int,
    least: int,
) -> list[NDArray[np.int64]]:
    """The blocks to break to reclaim ``reclaim`` bytes: by guest, their numbers.

    What a block gives depends on which others are broken: a content that is in no small page yet gives nothing the
    first time. So each is counted as it is chosen, and the choice ends when what was asked for is really there.

    :param heat: by guest and block, how often it was touched; the scale is of no matter.
    :param least: pages that a block must give, if all are broken.
    """
    offered = estimate(guests, of_zeros, 1, pooled).by_block
    rows = [
        (index, block, float(offered[index][block]) / (1 + float(heat[index][block])))
        for index in range(len(guests))
        for block in np.flatnonzero(offered[index] >= least).tolist()
    ]
    # What a touch costs more afterwards is weighed against what is got for it; equal ones of several guests are likely
    # copies of one another.
    rows.sort(key=lambda row: (-row[2], row[1], row[0]))
    small = [guest.digests[guest.stable & ~guest.large] for guest in guests]
    kinds = np.unique(np.concatenate([*(guest.digests for guest in guests), pooled]))
    there = np.isin(kinds, np.concatenate([*small, pooled]))
    chosen: list[list[int]] = [[] for _ in guests]
    got = 0
    for index, block, _ in rows:
        if got * PAGE_SIZE >= reclaim:
            break
        chosen[index].append(block)
        guest, pages = guests[index], slice(block * LARGE, (block + 1) * LARGE)
        held = guest.digests[pages][guest.stable[pages] & guest.large[pages]]
        zeros = held == of_zeros
        which = np.unique(np.searchsorted(kinds, held[~zeros]))
        got += held.size - int(np.count_nonzero(~there[which]))
        there[which] = True
    return [np.array(sorted(blocks), dtype=np.int64) for blocks in chosen]


@dataclass(frozen=True, slots=True)
class TlbCost:
    """What broken large pages cost: ``broken`` of them, so many more TLB ``entries`` to cover the same memory.

    ``seconds_per_second``: of processor time for page walks, an upper bound: every touch of another small page there
    misses the TLB, and walks for as long as was measured for memory in small pages beyond memory in large ones.
    """

    broken: int
    entries: int
    seconds_per_second: float


def tlb_cost(broken: int, touches_per_second: float, walk_ns: float) -> TlbCost:
    """The cost of ``broken`` large pages in which that many small ones are touched a second; ``walk_ns`` a walk."""
    return TlbCost(broken, broken * _SMALL_ENTRIES, touches_per_second * walk_ns * 1e-9)
