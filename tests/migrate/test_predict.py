"""Predictions: ranges for a guest that does what it did, and honest words where it cannot be told."""

from __future__ import annotations

import msgspec
import pytest

from outboard.migrate.codec import Compress
from outboard.migrate.method import Goal, Method, Options
from outboard.migrate.plan import Expected, Link, Past, Range, Watched, recommend
from outboard.migrate.predict import link_of, play, predict
from outboard.migrate.throttle import Growth
from outboard.pages import PAGE_SIZE

LINK = Link(Range(100e6, 100e6), "a test")


def watched(rate: float, working_set: int = 16384) -> Watched:
    """A guest of 256 MiB, half of it with content, that writes ``rate`` pages/s of a working set."""
    times = [0.05, 0.12, 0.3, 0.7, 1.5, 3.0]
    return Watched(
        pages=65536,
        populated=40000,
        data=Range(32000, 33000),
        zero=Range(7000, 8000),
        free_data=Range(4000, 4500),
        early=3000,
        compressed=0.5,
        growth=[(at, int(min(working_set, rate * at))) for at in times],
        seconds=3.0,
        trace="pagemap",
        hints="guest agent: 65536 pages classed",
        hints_s=0.2,
    )


def of(method: Method, seen: Watched, options: Options | None = None, past: Past | None = None) -> Expected:
    found = predict(seen, LINK, past or Past(), options or Options())
    return next(one for one in found if one.method is method)


def test_a_quiet_guest_ends_by_every_method_and_free_pages_do_not_go() -> None:
    for method in Method:
        one = of(method, watched(10), Options(compress=Compress.NONE))
        assert one.ends
        assert one.share == 1
        assert one.total_s.high is not None
        assert one.bytes.high is not None
        assert one.resume_s.low <= one.total_s.low <= one.total_s.high
        held_back = 0 if method is Method.POST_COPY else 4500
        assert (32000 - held_back) * PAGE_SIZE <= one.bytes.low <= one.bytes.high < 40000 * PAGE_SIZE
        # The link carries 24,414 pages/s.
        assert one.total_s.low > 1.1


def test_a_guest_that_writes_too_fast_is_held_back_or_does_not_end() -> None:
    busy = watched(60000, working_set=200000)
    held = of(Method.PRE_COPY, busy)
    assert held.ends
    assert held.share < 0.5
    assert "held to about" in held.verdict
    free = of(Method.PRE_COPY, busy, Options(throttle=False))
    assert free.ends is False
    assert (free.total_s.high, free.bytes.high) == (None, None)
    assert "does not end" in free.verdict
    hybrid = of(Method.HYBRID, busy, Options(throttle=False))
    assert hybrid.ends
    assert hybrid.bytes.high is not None
    enlightened = of(Method.ENLIGHTENED, busy)
    assert enlightened.ends
    assert enlightened.verdict == "ends whatever the guest writes"


def test_what_earlier_migrations_tell_narrows_the_ranges() -> None:
    alone = of(Method.ENLIGHTENED, watched(10))
    told = of(Method.ENLIGHTENED, watched(10), past=Past(blackouts_ms=[30.0, 40.0], resumes_s=[0.8, 1.0]))
    assert told.resume_s.high is not None
    assert alone.resume_s.high is not None
    assert told.resume_s.high < alone.resume_s.high
    assert told.blackout_ms.low == 15
    assert told.blackout_ms.high is not None
    assert alone.blackout_ms.high is not None
    assert told.blackout_ms.high < alone.blackout_ms.high


def test_without_hints_free_pages_go_too() -> None:
    asked = of(Method.HYBRID, watched(10), Options(compress=Compress.NONE))
    silent = of(Method.HYBRID, watched(10), Options(compress=Compress.NONE, hints=False))
    assert silent.bytes.low == pytest.approx(asked.bytes.low + 4500 * PAGE_SIZE, rel=0.01)


def test_packing_may_save_what_was_tried_and_more() -> None:
    packed, plain = (
        of(Method.ENLIGHTENED, watched(10)),
        of(Method.ENLIGHTENED, watched(10), Options(compress=Compress.NONE)),
    )
    assert packed.bytes.low < 0.3 * plain.bytes.low
    assert packed.bytes.high == plain.bytes.high
    assert packed.total_s.low < plain.total_s.low


def test_a_pause_that_is_verified_is_as_long_as_the_rest() -> None:
    one = of(Method.ENLIGHTENED, watched(10), Options(verify=True))
    assert one.blackout_ms.high == pytest.approx(1e3 * (one.total_s.high or 0))


def test_rounds_are_played_as_they_are_run() -> None:
    growth = Growth()
    growth.note(10.0, 5000)  # 500 pages/s
    played = play(growth, 10000, 1000, Options(max_downtime=0.15), Method.PRE_COPY, most=1 << 20)
    # 10,000 in 10 s, 5,000 in 5 s, 2,500, 1,250, 625, 312, 156; 78 fit in the pause of 100.
    assert played.ends
    assert played.seconds == pytest.approx(sum(10 / 2**n for n in range(7)))
    assert played.pages == pytest.approx(10000 * (2 - 1 / 2**7), rel=0.01)
    hybrid = play(growth, 10000, 1000, Options(), Method.HYBRID, most=1 << 20)
    assert hybrid.ends
    growth.note(10.0, 8000)
    early = play(growth, 10000, 1000, Options(), Method.HYBRID, most=1 << 20)
    assert (early.ends, early.seconds, early.left) == (True, 10.0, 8000)


def test_rounds_that_are_cut_short_end_in_a_pause_as_long_as_what_is_left() -> None:
    busy = watched(60000, working_set=200000)
    cut = of(Method.PRE_COPY, busy, Options(throttle=False, timeout=5.0))
    assert cut.ends
    assert cut.verdict == "ends when its time is over (--timeout), if not before"
    # Its memory is written to whole while 24,414 pages/s go out.
    assert cut.blackout_ms.high == pytest.approx(1e3 * busy.pages / (LINK.rate.low / PAGE_SIZE), rel=0.3)
    growth = Growth()
    growth.note(10.0, 5000)
    played = play(growth, 10000, 1000, Options(timeout=12.0), Method.PRE_COPY, most=1 << 20)
    # 2 s of the second round were left, of 5,000 pages that 3,000 of stay and 1,000 are written meanwhile.
    assert (played.seconds, played.pages - played.left, played.left) == (12.0, 12000, 4000)


@pytest.mark.parametrize(
    ("bursts", "rates", "limit", "low", "high", "words"),
    [
        ([50e6, 100e6], [], None, 15e6, 300e6, "bursts that were carried at 50 to 100 MB/s"),
        ([100e6], [50e6, 80e6], None, 30e6, 112e6, "2 earlier migrations"),
        ([100e6], [], 10_000_000, 8e6, 11e6, "limit of 10 MB/s"),
        ([], [], 10_000_000, 2e6, 10e6, "the limit alone"),
        ([], [], None, 10e6, 1.25e9, "nothing"),
    ],
)
def test_how_fast_the_link_is(
    bursts: list[float], rates: list[float], limit: int | None, low: float, high: float, words: str
) -> None:
    link = link_of(bursts, rates, limit)
    assert link.rate.low == pytest.approx(low)
    assert link.rate.high == pytest.approx(high)
    assert words in link.known_from


def test_the_recommendation_follows_the_goal_and_the_figures() -> None:
    quiet, busy = (
        predict(watched(10), LINK, Past(), Options()),
        predict(watched(60000, 200000), LINK, Past(), Options()),
    )
    assert recommend(quiet, None)[0] is Method.PRE_COPY
    assert recommend(busy, None)[0] in (Method.ENLIGHTENED, Method.POST_COPY)
    assert recommend(quiet, Goal.GUEST_SPEED)[0] is Method.PRE_COPY
    assert recommend(busy, Goal.GUEST_SPEED)[0] is Method.HYBRID
    assert recommend(busy, Goal.BANDWIDTH)[0] is Method.ENLIGHTENED
    for goal in (Goal.TIME, Goal.DOWNTIME):
        method, why = recommend(busy, goal)
        assert method is not None
        assert "shortest" in why
    endless = [msgspec.structs.replace(one, ends=None) for one in quiet]
    assert recommend(endless, None) == (None, "no method can be said to end")


def test_what_both_hosts_may_have_on_disk_widens_what_is_thought_possible() -> None:
    seen = msgspec.structs.replace(watched(10), on_disk=Range(9000, 10000))
    plain, options = of(Method.POST_COPY, watched(10)), Options()
    found = of(Method.POST_COPY, seen, options)
    assert found.bytes.low < plain.bytes.low
    assert found.bytes.high == plain.bytes.high
    assert of(Method.POST_COPY, seen, msgspec.structs.replace(options, blocks="off")) == plain
