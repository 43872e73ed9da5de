"""Advice about another process's memory."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import pidfd
from outboard.linux.pagemap import Category, Pagemap
from outboard.linux.process_madvise import Advice, advise
from tests.support.requirements import require
from tests.support.target import Target


def present(target: Target) -> int:
    # Bit 63 of a classic entry, so that kernels without PAGEMAP_SCAN are served.
    with Pagemap(target.pid) as pagemap:
        return int((pagemap.entries(target.start, target.pages) >> np.uint64(63)).sum())


def test_pageout_unmaps_thousands_of_ranges_and_loses_nothing() -> None:
    require("no-swap")
    with Target(mebibytes=32) as target:
        process = pidfd.open(target.pid)
        ranges = [(target.at(page), 4096) for page in range(0, 2 * 3000, 2)]
        before = present(target)
        assert advise(process, ranges, Advice.PAGEOUT) == 3000 * 4096
        # A few pages can stay where somebody else holds them for a moment.
        assert before - present(target) > 2900
        assert target.ask("r 2") == "2"
        pidfd.close(process)


def test_an_array_is_taken_and_left_as_it_is() -> None:
    with Target() as target:
        process = pidfd.open(target.pid)
        ranges = np.array([(target.at(0), 8192), (target.at(4), 4096)], dtype=np.uint64)
        before = ranges.copy()
        assert advise(process, ranges, Advice.COLD) == 12288
        assert np.array_equal(ranges, before)
        assert advise(process, [], Advice.COLD) == 0
        pidfd.close(process)


def test_a_range_that_is_refused_after_others_is_an_error() -> None:
    with Target() as target:
        process = pidfd.open(target.pid)
        ranges = [(target.at(0), 4096), (target.at(1), 4096), (4096, 4096), (target.at(2), 4096)]
        with pytest.raises(KernelError, match=r"process_madvise\(COLD\) of 2 ranges from 0x1000 on") as caught:
            advise(process, ranges, Advice.COLD)
        assert caught.value.errno == errno.ENOMEM
        pidfd.close(process)


def test_category_of_what_was_paged_out() -> None:
    require("no-swap", "pagemap-scan")
    with Target() as target, Pagemap(target.pid) as pagemap:
        process = pidfd.open(target.pid)
        advise(process, [(target.at(0), 64 * 4096)], Advice.PAGEOUT)
        found = pagemap.scan(
            target.at(0), target.at(64), required=Category.PRESENT, inverted=Category.PRESENT, report=Category.PRESENT
        )
        assert int((found[:, 1] - found[:, 0]).sum()) > 60 * 4096
        pidfd.close(process)
