"""PAGEMAP_SCAN with asynchronous write-protection, and the classic entries."""

from __future__ import annotations

import errno
import os
import signal

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import pagemap as pagemap_module
from outboard.linux import ptrace
from outboard.linux.pagemap import (
    SOFT_DIRTY_ENTRY,
    Category,
    Pagemap,
    clear_soft_dirty,
    has_pagemap_scan,
)
from outboard.linux.userfaultfd import Features, Mode, Userfaultfd
from tests.support.requirements import require
from tests.support.target import Target

ASYNC = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM | Features.WP_UNPOPULATED | Features.WP_ASYNC


def written(pagemap: Pagemap, target: Target, protect: bool = True) -> list[tuple[int, int]]:
    ranges = pagemap.scan(
        target.start,
        target.start + target.size,
        required=Category.WRITTEN,
        report=Category.WRITTEN,
        protect=protect,
        check_async=True,
    )
    return [((low - target.start) // 4096, (high - low) // 4096) for low, high, _ in ranges.tolist()]


def test_writes_are_seen_once() -> None:
    require("wp-async", "pagemap-scan")
    with (
        Target() as target,
        Pagemap(target.pid) as pagemap,
        Userfaultfd(ptrace.inject_userfaultfd(target.pid)[0]) as uffd,
    ):
        uffd.api(ASYNC)
        uffd.register(target.start, target.size, Mode.WP)
        written(pagemap, target)
        assert written(pagemap, target) == []
        target.ask("r 8")
        for page in (5, 6, 100):
            target.ask(f"w {page} 1")
        assert written(pagemap, target) == [(5, 2), (100, 1)]
        assert written(pagemap, target) == []


def test_thousands_of_ranges_are_all_reported() -> None:
    require("wp-async", "pagemap-scan")
    with (
        Target(mebibytes=160) as target,
        Pagemap(target.pid) as pagemap,
        Userfaultfd(ptrace.inject_userfaultfd(target.pid)[0]) as uffd,
    ):
        uffd.api(ASYNC)
        uffd.register(target.start, target.size, Mode.WP)
        written(pagemap, target)
        with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
            for page in range(0, target.pages, 2):
                os.pwrite(memory.fileno(), b"x", target.at(page))
        expected = [(page, 1) for page in range(0, target.pages, 2)]
        assert written(pagemap, target, protect=False) == expected
        assert written(pagemap, target) == expected
        assert written(pagemap, target) == []


def test_check_async_refuses_memory_that_would_block_its_writer() -> None:
    require("pagemap-scan")
    with Target() as target, Pagemap(target.pid) as pagemap, pytest.raises(KernelError, match="PAGEMAP_SCAN"):
        written(pagemap, target)


def test_entries_tell_presence() -> None:
    with Target() as target, Pagemap(target.pid) as pagemap:
        assert np.all(pagemap.entries(target.start, target.pages) >> np.uint64(63) == 1)


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(KernelError, match="pagemap"):
        Pagemap(2**22 + 1)


def test_soft_dirty_pages_are_those_written_since() -> None:
    require("soft-dirty")
    with Target() as target, Pagemap(target.pid) as pagemap:
        for page in (5, 100):
            clear_soft_dirty(target.pid)
            target.ask(f"w {page} 1")
            target.ask("r 8")
            dirty = pagemap.entries(target.start, target.pages) & np.uint64(SOFT_DIRTY_ENTRY)
            assert np.flatnonzero(dirty).tolist() == [page]


def test_clearing_for_a_process_that_is_not_there() -> None:
    with pytest.raises(KernelError, match="clear_refs"):
        clear_soft_dirty(2**22 + 1)


def test_a_kernel_without_the_scan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> int:
        raise KernelError("PAGEMAP_SCAN", errno.ENOTTY)

    monkeypatch.setattr(pagemap_module, "PAGEMAP_SCAN", lacking)
    assert not has_pagemap_scan()


def test_entries_of_a_process_that_has_ended() -> None:
    with Target() as target, Pagemap(target.pid) as pagemap:
        os.kill(target.pid, signal.SIGKILL)
        target.ended()
        with pytest.raises(KernelError, match="pagemap entries") as caught:
            pagemap.entries(target.start, 4)
        assert caught.value.errno == errno.ESRCH
