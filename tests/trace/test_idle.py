"""Idle pages are those that nobody touched since the trace began."""

from __future__ import annotations

import pytest

from outboard.errors import KernelError
from outboard.pages.pageset import PageSet
from outboard.trace.idle import IdleTrace
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


def test_what_is_touched_is_not_idle_and_keeps_its_content() -> None:
    require("root", "no-swap")
    with Target(mebibytes=4) as target, guest_of(target) as guest:
        idle = IdleTrace(guest).idle()
        # What another processor has just taken in stays mapped.
        assert len(idle) > target.pages - 100
        watched = [page for page in (7, 100, 500) if page in idle]
        trace = IdleTrace(guest)
        assert target.ask("r 7") == "7"
        assert target.ask("w 100 5") == "written"
        now = trace.idle()
        assert 7 not in now
        assert 100 not in now
        # The kernel maps what lies around a page that is read (fault-around), 16 pages in all.
        assert len(idle - now) <= 32
        assert (500 in watched) == (500 in now)
        assert target.ask("t").split()[1] == str(target.pages * (target.pages - 1) // 2 - 100 + 5)
        assert trace.idle() == PageSet(target.pages)


def test_a_process_that_has_ended() -> None:
    require("root", "no-swap")
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        target.say("q")
        target.ended()
        with pytest.raises(KernelError, match="No such process"):
            IdleTrace(guest)
