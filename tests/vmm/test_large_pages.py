"""Large mappings of a process: which they are, and more of them."""

from __future__ import annotations

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux.userfaultfd import Features, Mode
from outboard.pages import LARGE
from outboard.pages.pageset import PageSet
from outboard.vmm.clamp import Clamp
from outboard.vmm.large_pages import collapse, large_mappings
from tests.support.machine import huge_pages, transparent_huge_pages
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


def test_hugetlb_pages_are_large() -> None:
    require("pagemap-scan")
    with huge_pages(4), Target("hugetlb", mebibytes=8) as target, guest_of(target) as guest:
        assert large_mappings(guest) == PageSet.full(guest.pages)


def test_small_mappings_are_collapsed_and_keep_their_content() -> None:
    require("pagemap-scan")
    with transparent_huge_pages(), Target("thp", mebibytes=8) as target, guest_of(target) as guest:
        assert large_mappings(guest) == PageSet.full(guest.pages)
        clamp = Clamp.inject(guest, Features.MISSING_SHMEM | Features.MINOR_SHMEM, Mode.MISSING | Mode.MINOR)
        guest.memory.punch(LARGE + 9, 1)
        clamp.release()
        target.ask("t")
        some = PageSet.from_runs(guest.pages, np.array([[LARGE, LARGE]]))
        assert not large_mappings(guest) & some
        assert len(collapse(guest, some)) == 0
        assert large_mappings(guest) == PageSet.full(guest.pages)
        assert [target.ask(f"r {page}") for page in (LARGE + 8, LARGE + 9)] == [str(LARGE + 8), "0"]


def test_what_the_kernel_would_not_is_told() -> None:
    with Target(mebibytes=4) as target, guest_of(target) as guest:
        every = PageSet.full(guest.pages)
        if target.start % (LARGE * 4096):
            # Not even aligned: no setting of the kernel's makes it large.
            assert collapse(guest, every) == every
        target.say("q")
        target.ended()
        with pytest.raises(KernelError):
            collapse(guest, every)
