"""Each back end of the access trace tells exactly what was touched, once, and lets it be touched."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import proc
from outboard.linux.userfaultfd import Features, Mode, available_features
from outboard.pager.pager import Pager
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores.file import FileStore
from outboard.trace import accesses
from outboard.trace.accesses import AccessTrace, ManagedTrace, MessagesTrace, PageTablesTrace, open_access_trace
from outboard.trace.running import Running
from outboard.trace.zap import Dontneed, Pageout, open_zap
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest
from tests.support.cluster import wait_for
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def target() -> Iterator[Target]:
    with Target(mebibytes=16) as running:
        yield running


@pytest.fixture
def guest(target: Target) -> Iterator[Guest]:
    with guest_of(target) as found:
        yield found


@pytest.fixture(params=["page-tables-pageout", "page-tables-dontneed", "messages-pageout", "messages-dontneed"])
def trace(guest: Guest, request: pytest.FixtureRequest) -> Iterator[AccessTrace]:
    if request.param.endswith("pageout"):
        require("no-swap")
    if request.param.startswith("page-tables"):
        require("wp-async")
    kind = PageTablesTrace if request.param.startswith("page-tables") else MessagesTrace
    way = Pageout if request.param.endswith("pageout") else Dontneed
    with kind(guest, way) as opened:
        yield opened


def some(guest: Guest, *numbers: int) -> PageSet:
    return PageSet.from_numbers(guest.pages, np.array(numbers, dtype=np.int64))


def arm(trace: AccessTrace, pages: PageSet) -> None:
    """Arm all of ``pages``: those that a processor has in hand for its LRU lists, which cannot be zapped, once more."""
    deadline = time.monotonic() + 10
    while left := pages - trace.arm(pages):
        assert time.monotonic() < deadline, left
        pages = left
        time.sleep(0.01)


def test_armed_pages_are_told_of_once(target: Target, guest: Guest, trace: AccessTrace) -> None:
    # Not the last ones that the target has made: a processor holds those in hand, and MADV_PAGEOUT leaves them alone.
    wanted = some(guest, 3, 4, 5, 700, 4000)
    arm(trace, wanted)
    assert len(trace.collect()) == 0
    for order in ("r 700", "w 4 9", "r 6", "r 700", "w 700 1"):
        target.ask(order)
    found = trace.collect()
    assert sorted(found["page"].tolist()) == [4, 700]
    assert len(trace.collect()) == 0
    target.ask("r 700")
    assert len(trace.collect()) == 0
    arm(trace, some(guest, 700))
    assert target.ask("r 700") == "1"
    assert trace.collect()["page"].tolist() == [700]
    told = trace.statistics()
    assert (told.armed, told.accesses, told.at_once, told.dropped) == (6, 3, 0, 0)


def test_a_write_is_told_from_a_read(target: Target, guest: Guest, trace: AccessTrace) -> None:
    arm(trace, some(guest, *range(100, 140)))
    for page in range(100, 140, 2):
        target.ask(f"r {page}")
        target.ask(f"w {page + 1} 1")
    found = trace.collect()
    assert len(found) == 40
    written = found["page"][found["write"] != 0]
    assert bool(np.all(written % 2))
    # By page tables, a writer that was taken off its processor between two faults counts as a reader.
    assert written.size >= (20 if isinstance(trace, MessagesTrace) else 15)


def test_the_moment_lies_between_two_bounds(target: Target, trace: AccessTrace) -> None:
    numbers = np.arange(100, 200, 7)
    pages, since = trace.arm_each(numbers)
    assert pages.tolist() == numbers.tolist()
    moments = {}
    for page in reversed(pages.tolist()):
        before = time.monotonic_ns()
        target.ask(f"r {page}")
        moments[page] = (before, time.monotonic_ns())
    found = trace.collect()
    assert sorted(found["page"].tolist()) == pages.tolist()
    assert bool(np.all(np.diff(found["at"]) >= 0))
    for page, after, at, ran, _ in found.tolist():
        before, done = moments[page]
        assert after <= done
        assert at >= before
        began, had_run = since[pages.tolist().index(page)]
        assert after >= began
        # To a tick.
        assert ran >= had_run - 10_000_000


def test_disarmed_pages_are_not_told_of(target: Target, guest: Guest, trace: AccessTrace) -> None:
    arm(trace, some(guest, 1, 2, 3))
    trace.disarm(some(guest, 2))
    target.ask("t")
    assert sorted(trace.collect()["page"].tolist()) == [1, 3]
    arm(trace, some(guest, 2))
    target.ask("r 2")
    assert trace.collect()["page"].tolist() == [2]


def test_all_of_memory_is_armed_and_nothing_is_lost(target: Target, guest: Guest, trace: AccessTrace) -> None:
    everything = PageSet.full(guest.pages)
    target.ask("g")
    seen = 0
    for _ in range(5):
        trace.arm(everything)
        seen += len(trace.collect())
    assert target.ask("s").startswith("bad 0 of")
    assert seen > 0
    trace.collect()
    armed = trace.arm(everything)
    assert len(armed) >= guest.pages - 16
    assert target.ask("t").startswith("touched ")
    assert PageSet.from_numbers(guest.pages, trace.collect()["page"]) == armed


def test_closing_leaves_no_trace_in_the_process(target: Target, guest: Guest) -> None:
    before = proc.descriptors(target.pid)
    ours = os.listdir("/proc/self/fd")  # noqa: PTH208  # what counts is how many
    for _ in range(3):
        with open_access_trace(guest) as opened:
            opened.arm(PageSet.full(guest.pages))
        opened.close()
    assert len(os.listdir("/proc/self/fd")) == len(ours)  # noqa: PTH208
    assert proc.descriptors(target.pid) == before
    flags = proc.smaps(target.pid, target.start)["VmFlags"].split()
    assert not {"um", "uw", "ui"} & set(flags)
    assert target.ask("r 77") == "77"


@pytest.mark.parametrize("kind", [PageTablesTrace, MessagesTrace])
def test_the_guest_goes_on_when_we_are_killed(target: Target, guest: Guest, kind: type[AccessTrace]) -> None:
    require("wp-async")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        trace = kind(guest, Dontneed)
        trace.arm(PageSet.full(guest.pages))
        os.write(writer, b"armed")
        signal.pause()
    assert os.read(reader, 5) == b"armed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for fd in (reader, writer):
        os.close(fd)
    assert target.ask("t").startswith("touched ")
    with open_access_trace(guest) as trace:
        arm(trace, some(guest, 7))
        target.ask("r 7")
        assert trace.collect()["page"].tolist() == [7]


@pytest.mark.parametrize("kind", [PageTablesTrace, MessagesTrace])
def test_the_end_of_the_process_is_told(kind: type[AccessTrace]) -> None:
    require("wp-async")
    target = Target()
    with guest_of(target) as guest:
        trace = kind(guest, Dontneed)
        trace.arm(some(guest, 1, 2))
        target.__exit__(None, None, None)
        with pytest.raises(KernelError) as caught:
            trace.arm(some(guest, 3))
        assert caught.value.errno in (errno.ESRCH, errno.ENOENT)
        trace.close()
        trace.close()


def test_looking_at_the_tables_of_an_ended_process_is_told() -> None:
    require("wp-async", "no-swap")
    target = Target()
    with guest_of(target) as guest, PageTablesTrace(guest, Pageout) as trace:
        trace.arm(some(guest, 1, 2))
        target.__exit__(None, None, None)
        with pytest.raises(KernelError) as caught:
            trace.collect()
        assert caught.value.errno == errno.ESRCH
        with pytest.raises(KernelError):
            trace.arm(some(guest, 3))


def test_a_second_trace_is_refused(guest: Guest) -> None:
    with open_access_trace(guest), pytest.raises(RefusedError) as caught:
        open_access_trace(guest)
    assert caught.value.reason == "traced"
    with open_access_trace(guest):
        pass


def test_what_a_pager_holds_is_traced_too_and_what_it_evicted_is_armed(
    target: Target, guest: Guest, tmp_path: Path
) -> None:
    require("wp-async")
    pool = FileStore(tmp_path / "pool", guest.pages)
    pager = Pager(guest, Residency(guest.pages, tmp_path), {Where.POOL: pool})
    pager.evict(some(guest, 10, 11, 12), Where.POOL)
    with open_access_trace(guest) as trace:
        assert isinstance(trace, ManagedTrace)
        wanted = some(guest, 11, 12, 700, 701, 4000)
        arm(trace, wanted)
        # Armed first and evicted then is the same.
        pager.evict(some(guest, 4000), Where.POOL)
        assert len(trace.collect()) == 0
        for order in ("r 10", "r 11", "w 700 1", "r 4000"):
            target.ask(order)
        found = trace.collect()
        assert sorted(found["page"].tolist()) == [11, 700, 4000]
        assert set(found["write"].tolist()) == {-1}
    wait_for(lambda: pager.statistics().faults.pool == 3, "the count of the faults")
    pager.release()
    assert target.ask("r 12") == "12"
    with open_access_trace(guest) as trace:
        assert isinstance(trace, PageTablesTrace)
        assert not isinstance(trace, ManagedTrace)


def test_memory_that_is_registered_and_not_by_a_pager_is_refused(guest: Guest) -> None:
    theirs = Clamp.inject(guest, Features.MISSING_SHMEM, Mode.MISSING)
    with pytest.raises(RefusedError) as caught:
        open_access_trace(guest)
    assert caught.value.reason == "uffd-taken"
    theirs.release()


def test_the_best_back_end_is_chosen_by_probing(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    require("wp-async", "no-swap")
    with open_access_trace(guest) as trace:
        assert (trace.statistics().backend, trace.statistics().zap) == ("page-tables", "pageout")
    have = available_features()
    monkeypatch.setattr(accesses, "available_features", lambda: have & ~Features.WP_ASYNC)
    with open_access_trace(guest) as trace:
        assert trace.statistics().backend == "messages"
    monkeypatch.setattr(accesses, "available_features", lambda: Features(0))
    with pytest.raises(RefusedError) as caught:
        open_access_trace(guest)
    assert caught.value.reason == "access-trace"
    monkeypatch.setattr(proc, "meminfo", lambda: {"SwapTotal": 1})
    assert open_zap(guest, Running(guest.pid)).name == "dontneed"
