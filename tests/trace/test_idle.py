"""Idle pages are those that nobody touched since the trace began."""

from __future__ import annotations

import numpy as np
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
        trace = IdleTrace(guest)
        assert trace.idle() == PageSet.full(target.pages)
        assert target.ask("r 7") == "7"
        assert target.ask("w 100 5") == "written"
        busy = ~trace.idle()
        assert {7, 100} <= set(busy.numbers().tolist())
        # The kernel maps what lies around a page that is read (fault-around), 16 pages in all.
        assert len(busy) <= 32
        again = IdleTrace(guest)
        assert again.idle() == PageSet.full(target.pages)
        assert target.ask("t").split()[1] == str(target.pages * (target.pages - 1) // 2 - 100 + 5)
        assert again.idle() == PageSet(target.pages)
        assert not np.any(again.idle().mask())


def test_a_process_that_has_ended() -> None:
    require("root", "no-swap")
    with Target(mebibytes=1) as target, guest_of(target) as guest:
        target.say("q")
        target.ended()
        with pytest.raises(KernelError, match="No such process"):
            IdleTrace(guest)
