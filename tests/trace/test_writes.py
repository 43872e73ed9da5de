"""Each back end of the write trace sees exactly what was written, once, while the writer runs on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from outboard.linux import pagemap, proc
from outboard.pages.pageset import PageSet
from outboard.trace.writes import MessageTrace, PagemapTrace, SoftDirtyTrace, WriteTrace, open_write_trace
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

BACKENDS = [
    pytest.param(PagemapTrace, ("wp-async", "pagemap-scan"), id="pagemap"),
    pytest.param(MessageTrace, (), id="messages"),
    pytest.param(SoftDirtyTrace, ("soft-dirty",), id="soft-dirty"),
]


def numbers(pages: PageSet) -> list[int]:
    return [int(page) for page in pages.numbers()]


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
def test_writes_are_collected_once(backend: Callable[[Guest], WriteTrace], needs: tuple[str, ...]) -> None:
    require(*needs)
    with Target(mebibytes=16) as target:
        guest = guest_of(target)
        with backend(guest) as trace:
            assert numbers(trace.collect()) == []
            target.ask("r 9")
            for page in (3, 4, 700, 2047, 4095):
                target.ask(f"w {page} 1")
            assert numbers(trace.collect()) == [3, 4, 700, 2047, 4095]
            assert numbers(trace.collect()) == []
            target.ask("w 3 2")
            assert numbers(trace.collect()) == [3]
            assert trace.statistics().pages == 6
        guest.memory.close()
        assert target.ask("w 5 5") == "written"


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
def test_nothing_is_missed_while_writers_run(backend: Callable[[Guest], WriteTrace], needs: tuple[str, ...]) -> None:
    require(*needs)
    with Target(mebibytes=4) as target:
        guest = guest_of(target)
        copy = np.empty((target.pages, 4096), dtype=np.uint8)
        with backend(guest) as trace:
            stale = PageSet.full(target.pages)
            target.ask("g")
            for _ in range(30):
                for first, count in stale:
                    guest.memory.read_into(first, copy[first : first + count].reshape(-1).data)
                stale = trace.collect()
            assert target.ask("s").startswith("bad 0 of")
            stale |= trace.collect()
            for first, count in stale:
                guest.memory.read_into(first, copy[first : first + count].reshape(-1).data)
        truth = np.empty_like(copy)
        guest.memory.read_into(0, truth.reshape(-1).data)
        assert np.array_equal(copy, truth), "a page that was written was not collected"
        guest.memory.close()


def test_a_coarse_trace_tells_of_dense_blocks_whole() -> None:
    with Target(mebibytes=7) as target, guest_of(target) as guest, MessageTrace(guest, coarse=True) as trace:
        for page in (5, 600, *range(1030, 1037)):
            target.ask(f"w {page} 1")
        assert numbers(trace.collect()) == [5, 600, *range(1030, 1037)]
        for page in (5, 600, *range(1030, 1038), 1539, *range(1700, 1709)):
            target.ask(f"w {page} 1")
        assert numbers(trace.peek()) == [5, 600, *range(1024, 1792)]
        before = trace.writers(PageSet.full(guest.pages), 0).total()
        target.ask("w 1500 2")
        assert trace.writers(PageSet.full(guest.pages), 0).total() == before
        assert numbers(trace.collect()) == [5, 600, *range(1024, 1792)]
        target.ask("w 1500 3")
        assert numbers(trace.collect()) == [1500]


def test_a_coarse_trace_misses_nothing_either() -> None:
    with Target(mebibytes=4) as target, guest_of(target) as guest, MessageTrace(guest, coarse=True) as trace:
        copy, stale = np.empty((target.pages, 4096), dtype=np.uint8), PageSet.full(target.pages)
        target.ask("g")
        for _ in range(30):
            for first, count in stale:
                guest.memory.read_into(first, copy[first : first + count].reshape(-1).data)
            stale = trace.collect()
        assert target.ask("s").startswith("bad 0 of")
        truth = np.empty_like(copy)
        guest.memory.read_into(0, truth.reshape(-1).data)
        told = (stale | trace.collect()).mask()
        assert np.array_equal(copy[~told], truth[~told]), "a page that was written was not collected"


def test_a_look_at_a_part_tells_of_neighbours_and_leaves_the_rest() -> None:
    require("wp-async", "pagemap-scan")
    with Target(mebibytes=16) as target:
        guest = guest_of(target)
        with PagemapTrace(guest) as trace:
            for page in (5, 100, 3000):
                target.ask(f"w {page} 1")
            near = trace.collect(PageSet.from_numbers(target.pages, np.array([100])))
            assert numbers(near) == [5, 100]
            assert numbers(trace.collect()) == [3000]
        guest.memory.close()


def test_of_memory_that_nobody_has_used_only_use_is_looked_for_and_none_is_missed() -> None:
    require("wp-async", "pagemap-scan")
    with Target(mebibytes=256) as target:
        guest = guest_of(target)
        guest.memory.punch(2, target.pages - 2)
        with PagemapTrace(guest) as trace:
            assert protected(target, 1)
            assert protected(target, 2)
            assert not protected(target, 40_000)
            target.ask("w 2 1")
            target.ask("w 40000 1")
            assert numbers(trace.peek()) == [2, 40_000]
            assert numbers(trace.collect()) == [2, 40_000]
            assert protected(target, 40_000)
            assert protected(target, 40_001)
            assert numbers(trace.collect()) == []
            for page in (40_000, 40_001, 60_000):
                target.ask(f"w {page} 2")
            assert numbers(trace.collect(PageSet.full(guest.pages))) == [40_000, 40_001, 60_000]
            assert not trace.peek()
        guest.memory.close()


def protected(target: Target, page: int) -> bool:
    with pagemap.Pagemap(target.pid) as tables:
        entry = tables.entries(target.start + page * 4096, 1)[0]
    return bool(entry & np.uint64(pagemap.WRITE_PROTECTED_ENTRY))


@pytest.mark.parametrize(("backend", "needs"), BACKENDS)
def test_a_peek_takes_nothing_away(backend: Callable[[Guest], WriteTrace], needs: tuple[str, ...]) -> None:
    require(*needs)
    with Target(mebibytes=16) as target:
        guest = guest_of(target)
        with backend(guest) as trace:
            assert numbers(trace.peek()) == []
            for page in (5, 100, 3000):
                target.ask(f"w {page} 1")
            assert numbers(trace.peek()) == [5, 100, 3000]
            assert 100 in numbers(trace.peek(PageSet.from_numbers(target.pages, np.array([100]))))
            assert numbers(trace.collect()) == [5, 100, 3000]
            assert numbers(trace.peek()) == []
        guest.memory.close()


def test_closing_leaves_no_trace_in_the_process() -> None:
    with Target() as target:
        guest = guest_of(target)
        before = proc.descriptors(target.pid)
        for _ in range(3):
            open_write_trace(guest).close()
        assert proc.descriptors(target.pid) == before
        flags = proc.smaps(target.pid, target.start)["VmFlags"].split()
        assert not {"um", "uw", "ui"} & set(flags)
        guest.memory.close()


def test_closing_after_the_process_has_ended_is_quiet() -> None:
    target = Target()
    guest = guest_of(target)
    trace = open_write_trace(guest)
    target.__exit__(None, None, None)
    trace.close()
    trace.close()
    guest.memory.close()


def test_the_best_back_end_is_chosen_by_probing(monkeypatch: pytest.MonkeyPatch) -> None:
    require("wp-async", "pagemap-scan")
    with Target() as target:
        guest = guest_of(target)
        with open_write_trace(guest) as trace:
            assert trace.backend == "pagemap"
        monkeypatch.setattr(pagemap, "has_pagemap_scan", lambda: False)
        with open_write_trace(guest) as trace:
            assert trace.backend == "messages"
        guest.memory.close()
