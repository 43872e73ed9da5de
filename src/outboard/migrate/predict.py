"""What each method would do with a guest that was watched: times, blackout and bytes as ranges.

The low end of a range is the best that may be hoped for: the fastest rate, the quietest writes, the shortest start of
the destination; the high end the worst that is to be expected. Rounds are played through as
:mod:`outboard.migrate.rounds` runs them, with the same model of what a guest writes and the same decisions about
holding it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from outboard.migrate.codec import Compress
from outboard.migrate.method import EARLY_SECONDS, PAUSE_MOST_S, WORTH_A_ROUND, Method, Options
from outboard.migrate.plan import Expected, Link, Past, Range, Watched
from outboard.migrate.throttle import Growth, choose
from outboard.pages import PAGE_SIZE

_DEVICES_S = 0.05
_STATE_BYTES = (50e3, 3e6)
"""Of device state and messages."""
_START_S = (0.1, 5.0)
"""For the destination to be ready, where no earlier migration tells."""
_BLACKOUT_MS = (5.0, 400.0)
"""To save and load the devices, where no earlier migration tells."""
_FORGET_MS = 0.1
"""To make a page absent again that QEMU has mapped, and that may lie alone."""
_LAST_S = 0.2
"""Between the last time that pages are sent again and the pause."""
_WRITES = (0.5, 1.6)
"""How much quieter or busier the guest may be than it was while watched."""
_ZERO_BYTES = (1 / 8, 16.0)
"""A page of zeros is a bit, and a run of its own at worst."""
_PACKED = 0.5
"""How much better than the compression on trial packing may be."""
_SLOWER = 1.3
"""The bulk after the resume shares link and processors with the answers to faults."""
_MOST_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class _Played:
    """Rounds at one end of the ranges: pages sent in all, until when, what was left, and the share at the end.

    ``cut``: they end, if late, when the user's time is over.
    """

    pages: float
    seconds: float
    left: float
    share: float
    ends: bool
    cut: bool = False


def _grown(watched: Watched, factor: float) -> Growth:
    growth = Growth()
    for seconds, pages in watched.growth:
        growth.note(seconds, int(factor * pages))
    return growth


def play(
    growth: Growth, pages: float, rate: float, options: Options, method: Method, *, most: int, gain: float = 1.0
) -> _Played:
    """The rounds of one migration.

    :param pages: that the first round sends; :param rate: pages/s; :param most: pages that the guest has.
    """
    goal = rate * max(0.0, options.max_downtime - _DEVICES_S)
    throttles = options.throttle and method is Method.PRE_COPY
    sent, seconds, share, left = 0.0, 0.0, 1.0, pages
    until = math.inf if options.timeout is None else options.timeout
    for _ in range(_MOST_ROUNDS):
        took = min(left / rate, max(0.0, until - seconds))
        sent, seconds = sent + took * rate, seconds + took
        written = (gain if share < 1 else 1.0) * growth.within(share * took)
        before, left = left, min(most, left - took * rate + written)
        if left <= goal or (method is Method.HYBRID and left > WORTH_A_ROUND * before):
            return _Played(sent + left, seconds, left, share, True)
        if seconds >= until:
            return _Played(sent + left, seconds, left, share, True, True)
        if throttles:
            share = choose(growth, left, rate, goal, gain, share).share
    return _Played(sent, seconds, left, share, False)


def predict(watched: Watched, link: Link, past: Past, options: Options) -> list[Expected]:
    """What each of the four methods would do, with ``options`` otherwise."""
    return [_predict(method, watched, link, past, options) for method in Method]


def _predict(method: Method, watched: Watched, link: Link, past: Past, options: Options) -> Expected:
    hinted = options.hints and method is not Method.POST_COPY
    free_low, free_high = (watched.free_data.low, watched.free_data.high or 0.0) if hinted else (0.0, 0.0)
    data = (max(0.0, watched.data.low - free_high), max(0.0, (watched.data.high or 0.0) - free_low))
    if watched.on_disk is not None and options.blocks == "auto":
        # At best: the destination may not have the images.
        data = (max(0.0, data[0] - (watched.on_disk.high or 0.0)), data[1])
    rates = (link.rate.low / PAGE_SIZE, (link.rate.high or link.rate.low) / PAGE_SIZE)
    calm, busy = _grown(watched, _WRITES[0]), _grown(watched, _WRITES[1])
    start = _start(watched, past, hinted)
    extra = (_STATE_BYTES[0], _STATE_BYTES[1] + watched.pages / 2)
    zeros = [watched.zero.low * _ZERO_BYTES[0], (watched.zero.high or 0.0) * _ZERO_BYTES[1]]
    blackout = [_BLACKOUT_MS[0], _BLACKOUT_MS[1]]
    if past.blackouts_ms:
        blackout = [0.5 * min(past.blackouts_ms), 2 * max(past.blackouts_ms) + 20]
    if method.rounds:
        best = play(calm, data[0], rates[1], options, method, most=watched.pages)
        worst = play(busy, data[1], rates[0], options, method, most=watched.pages, gain=max(1.0, past.throttle_gain))
        pages = (best.pages, worst.pages if worst.ends else None)
        resume = (start[0] + best.seconds, start[1] + worst.seconds * _SLOWER if worst.ends else None)
        total = resume if method is Method.PRE_COPY else (resume[0], _plus(resume[1], _SLOWER * worst.left / rates[0]))
        ends = best.ends if best.ends == worst.ends else None
        share = (best.share + worst.share) / 2 if ends else min(best.share, worst.share)
        cut = worst.cut
        if method is Method.PRE_COPY:
            # What is left of rounds that are cut short is sent in the pause.
            blackout[1] += 1e3 * (worst.left / rates[0] if worst.cut else options.max_downtime)
        else:
            blackout[1] += _FORGET_MS * worst.left
    else:
        early = min(EARLY_SECONDS, watched.early / rates[0]) if method is Method.ENLIGHTENED else 0.0
        fastest = min(EARLY_SECONDS, watched.early / rates[1]) if method is Method.ENLIGHTENED else 0.0
        resume = (start[0] + fastest, start[1] + early * _SLOWER)
        # Until the resume early pages are written again, and pages come to life that were zeros, free or absent.
        again = min(busy.within(start[1] + early), watched.early + watched.pages - data[0])
        pages = (data[0], data[1] + again)
        total = (resume[0] + data[0] / rates[1], start[1] + early + _SLOWER * (data[1] + again) / rates[0])
        ends, share, cut = True, 1.0, False
        blackout[1] += 1e3 * PAUSE_MOST_S
        if method is Method.ENLIGHTENED:
            blackout[1] += _FORGET_MS * min(watched.early, busy.within(_LAST_S))
    # Zstandard does better than what was tried, and pages that are alike go as references.
    packed = 1.0
    if options.compress is not Compress.NONE:
        packed = _PACKED * (1.0 if watched.compressed is None else watched.compressed)
    total = (resume[0] + packed * (total[0] - resume[0]), total[1])
    octets = Range(
        packed * pages[0] * PAGE_SIZE + zeros[0] + extra[0],
        None if pages[1] is None else pages[1] * PAGE_SIZE * 1.01 + zeros[1] + extra[1],
    )
    high = total[1]
    if options.verify:
        blackout[1] = 1e3 * high if high is not None else blackout[1]
    return Expected(
        method=method,
        ends=ends,
        total_s=Range(total[0], high),
        resume_s=Range(resume[0], resume[1]),
        blackout_ms=Range(blackout[0], blackout[1]),
        bytes=octets,
        share=share,
        verdict=_verdict(method, ends, share, cut),
    )


def _plus(value: float | None, more: float) -> float | None:
    return None if value is None else value + more


def _start(watched: Watched, past: Past, hinted: bool) -> tuple[float, float]:
    """Seconds until pages of the bulk go out: the destination's QEMU starts, and the guest is asked meanwhile."""
    low, high = _START_S
    if past.resumes_s:
        low, high = min(low, 0.5 * min(past.resumes_s)), max(2.0, 2 * max(past.resumes_s))
    return low, max(high, 2 * watched.hints_s) if hinted else high


def _verdict(method: Method, ends: bool | None, share: float, cut: bool) -> str:
    if not method.rounds:
        return "ends whatever the guest writes"
    if ends is None:
        return "ends if the guest writes no more than it did and the link is fast, else not"
    if not ends:
        return "does not end: the guest writes faster than the link carries"
    if cut:
        return "ends when its time is over (--timeout), if not before"
    if share < 1:
        return f"ends with the writing vCPUs held to about {share:.0%} of their processor time"
    return "ends without anybody held back"


def link_of(bursts: Sequence[float], rates: Sequence[float], limit: int | None) -> Link:
    """What the bulk may be expected to reach.

    :param bursts: bytes/s of short bursts to the destination; :param rates: of earlier migrations' bulk;
    :param limit: the user's.
    """
    if rates:
        low, high, known = 0.6 * min(rates), 1.4 * max(rates), f"{len(rates)} earlier migrations to that host"
    elif bursts:
        # A burst costs neither end the reading, sorting and placing of pages; and it is short: whatever else a host had
        # to do in that moment made it look slow.
        low, high = 0.3 * min(bursts), 3 * max(bursts)
        known = f"bursts that were carried at {min(bursts) / 1e6:.0f} to {max(bursts) / 1e6:.0f} MB/s"
    elif limit is not None:
        low, high, known = 0.2 * limit, 1.0 * limit, "the limit alone"
    else:
        low, high, known = 10e6, 1.25e9, "nothing: 10 MB/s to 10 Gbit/s"
    if limit is not None:
        low, high = min(low, 0.8 * limit), min(high, 1.1 * limit)
        known += f", and the limit of {limit / 1e6:.0f} MB/s"
    return Link(Range(low, high), known)
