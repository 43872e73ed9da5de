"""What is touched between two looks is seen, and told from what is not."""

from __future__ import annotations

import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import process_madvise
from outboard.linux.userfaultfd import Features, available_features
from outboard.trace import touched as trace_of
from outboard.trace.touched import Touched, TouchTrace
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


def look(trace: TouchTrace) -> Touched:
    """What was touched, and arm it all again."""
    found = trace.seen(0, trace.units)
    trace.arm(0, trace.units)
    return found


def test_what_is_touched_is_seen_once_and_without_its_neighbours() -> None:
    require("root", "no-swap")
    with Target(mebibytes=8) as target, guest_of(target) as guest, TouchTrace(guest) as trace:
        look(trace)
        assert not look(trace).pages.size
        assert target.ask("r 1007") == "1007"
        assert target.ask("w 1500 5") == "written"
        found = look(trace)
        assert found.pages.tolist() == [1007, 1500]
        assert found.written is None
        assert not look(trace).pages.size
        assert target.ask("r 1007") == "1007"
        assert look(trace).pages.tolist() == [1007]
        target.say("q")
        target.ended()
        with pytest.raises(KernelError):
            look(trace)


def test_writes_are_told_from_reads() -> None:
    require("root", "no-swap")
    if not available_features() & Features.WP_ASYNC:
        pytest.skip("UFFD_FEATURE_WP_ASYNC")
    with Target(mebibytes=8) as target, guest_of(target) as guest, TouchTrace(guest, writes=True) as trace:
        look(trace)
        look(trace)
        target.ask("r 1007")
        target.ask("w 1500 5")
        found = look(trace)
        assert found.pages.tolist() == [1007, 1500]
        assert found.written is not None
        assert found.written.tolist() == [1500]


def test_large_pages_are_looked_at_whole() -> None:
    require("root", "no-swap")
    with Target(mebibytes=8) as target, guest_of(target) as guest, TouchTrace(guest, per=512) as trace:
        look(trace)
        look(trace)
        target.ask("r 700")
        assert look(trace).pages.tolist() == [512]


def test_a_process_has_one_trace_and_its_content_stays() -> None:
    require("root", "no-swap")
    with Target(mebibytes=8) as target, guest_of(target) as guest:
        with TouchTrace(guest) as trace:
            with pytest.raises(RefusedError, match="traced already"):
                TouchTrace(guest)
            target.ask("g")
            for _ in range(20):
                look(trace)
            assert target.ask("s").startswith("bad 0 of ")
        assert target.ask("t").split()[0] == "touched"
        with TouchTrace(guest) as again:
            look(again)


def test_writes_that_cannot_be_told_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require("root")
    monkeypatch.setattr(trace_of, "available_features", lambda: Features.PAGEFAULT_FLAG_WP)
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        with pytest.raises(RefusedError, match="WP_ASYNC"):
            TouchTrace(guest, writes=True)
        with TouchTrace(guest) as trace:
            look(trace)
            target.ask("r 7")
            assert 7 in look(trace).pages, "its neighbours may be there too"


def test_a_part_is_looked_at_by_itself() -> None:
    require("root", "no-swap")
    with Target(mebibytes=8) as target, guest_of(target) as guest, TouchTrace(guest) as trace:
        trace.arm(1000, 100)
        trace.arm(1000, 100)
        for page in (999, 1000, 1050, 1100):
            target.ask(f"r {page}")
        assert trace.seen(1000, 100).pages.tolist() == [1000, 1050]
        assert trace.seen(1001, 10).pages.tolist() == []


def test_what_is_touched_before_anybody_can_look_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    require("root", "no-swap")
    drop = process_madvise.advise

    def touched_at_once(process: int, ranges: list[tuple[int, int]], advice: process_madvise.Advice) -> int:
        done = drop(process, ranges, advice)
        target.ask("r 1007")
        return done

    with Target(mebibytes=8) as target, guest_of(target) as guest, TouchTrace(guest) as trace:
        trace.arm(0, trace.units)
        monkeypatch.setattr(process_madvise, "advise", touched_at_once)
        trace.arm(0, trace.units)
        assert trace.seen(0, trace.units).pages.tolist() == [1007]
