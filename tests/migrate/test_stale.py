"""What is found stale, and what comes to life."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from outboard.migrate.devices import Devices
from outboard.migrate.findings import Findings
from outboard.migrate.line import Line
from outboard.migrate.method import Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.ranking import UNCLASSED
from outboard.migrate.stale import Stale
from outboard.migrate.turns import NEVER
from outboard.pages import LARGE
from outboard.pages.pageset import PageSet
from outboard.trace.writes import WriteTrace
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.target import Target


class Reported:
    """A trace that reports what it is told to."""

    def __init__(self, pages: PageSet) -> None:
        self._pages = pages

    def collect(self, within: PageSet | None = None) -> PageSet:
        del within
        return self._pages


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Target(mebibytes=8) as target, guest_of(target) as guest:
        yield guest


@pytest.mark.parametrize("unit", [1, LARGE])
def test_what_was_free_comes_to_life_when_it_is_written_to_unless_it_has_gone_with_a_large_page(
    guest: Guest, unit: int
) -> None:
    outbox = Outbox(guest.pages, unit=unit)
    outbox.rank[: 2 * LARGE] = 5
    outbox.rank[100:200] = outbox.rank[LARGE : LARGE + 50] = NEVER
    outbox.sent[:LARGE] = 1
    stale = Stale(guest, outbox, cast(Line, None), Options(), Findings(), cast(Devices, None))
    written = PageSet.from_runs(guest.pages, np.array([[0, 3 * LARGE]]))
    stale.trace = cast(WriteTrace, Reported(written))
    stale.revive()
    assert (outbox.rank[100:200] == (UNCLASSED if unit == 1 else NEVER)).all()
    assert (outbox.rank[LARGE : LARGE + 50] == UNCLASSED).all()
    assert (outbox.rank[2 * LARGE : 3 * LARGE] == UNCLASSED).all()
    assert outbox.unsent() == PageSet.from_runs(guest.pages, np.array([[LARGE, 2 * LARGE]]))
