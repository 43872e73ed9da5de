"""Who writes is told, and no write is lost by asking."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from outboard.linux import proc
from outboard.pages.pageset import PageSet
from outboard.trace.writers import blocks_around
from outboard.trace.writes import MessageTrace, PagemapTrace, WriteTrace
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def target() -> Iterator[Target]:
    with Target(mebibytes=16, threads=1) as running:
        yield running


@pytest.fixture
def guest(target: Target) -> Iterator[Guest]:
    with guest_of(target) as found:
        yield found


@pytest.fixture(params=[PagemapTrace, MessageTrace])
def trace(guest: Guest, request: pytest.FixtureRequest) -> Iterator[WriteTrace]:
    require("wp-async")
    with request.param(guest) as opened:
        yield opened


def test_blocks_lie_around_what_was_written(guest: Guest) -> None:
    written = PageSet.from_numbers(guest.pages, np.array([3, 5, 700, 4090]))
    blocks = blocks_around(guest, written)
    assert [(block.first, block.pages) for block in blocks] == [(0, 64), (640, 64), (4032, 64)]
    for block in blocks:
        assert block.hva == guest.regions[0].hva + block.first * 4096
        assert block.offset == block.first * 4096
    assert blocks_around(guest, PageSet(guest.pages)) == ()
    assert len(blocks_around(guest, PageSet.full(guest.pages))) == 8


def test_the_thread_that_writes_is_met_and_no_other(target: Target, guest: Guest, trace: WriteTrace) -> None:
    target.ask("g")
    writer = next(thread.tid for thread in proc.threads(target.pid) if thread.tid != target.pid)
    written = PageSet(guest.pages)
    while not written:
        written = trace.collect()
    met = trace.writers(written, 2.0)
    assert set(met) == {writer}
    assert target.ask("s").startswith("bad 0 of")
    trace.collect()
    # Everything is traced as before.
    assert not trace.collect()
    target.ask("w 7 1")
    target.ask("w 4000 1")
    assert trace.collect().numbers().tolist() == [7, 4000]


def test_what_is_written_while_asking_is_told_later(target: Target, trace: WriteTrace) -> None:
    trace.collect()
    target.ask("w 100 1")
    written = trace.peek()
    target.ask("w 101 1")
    trace.writers(written, 0.05)
    target.ask("w 102 1")
    told = trace.collect().mask()
    assert told[[100, 101, 102]].all()
    assert not trace.collect()


def test_asking_about_nothing_tells_of_nobody(guest: Guest) -> None:
    require("wp-async")
    with PagemapTrace(guest) as trace:
        assert not trace.writers(PageSet(guest.pages), 0.01)


def test_a_writer_waits_as_long_as_it_shall_and_a_reader_does_not(target: Target, guest: Guest) -> None:
    require("wp-async")
    with MessageTrace(guest) as trace:
        trace.delay_s = 60.0
        target.ask("r 9")
        target.say("w 9 5")
        assert target.waits()
        assert not trace.collect()
        trace.delay_s = 0.0
        assert target.answer() == "written"
        assert trace.collect().numbers().tolist() == [9]
        trace.delay_s = 0.005
        for page in range(20, 25):
            assert target.ask(f"w {page} 1") == "written"
        assert trace.collect().numbers().tolist() == list(range(20, 25))
