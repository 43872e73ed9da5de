"""Where pages lie, and which can be zapped alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from outboard.linux import proc
from outboard.trace.running import Running
from outboard.trace.zap import Dontneed, heads, open_zap, places_of
from outboard.vmm.guest import Guest, Region
from tests.support.target import Target


@pytest.fixture
def guest() -> Iterator[Guest]:
    """4 KiB pages 0 to 511, then two large pages, 512 to 1535, as though the target's memory were such."""
    with Target(mebibytes=8) as target:
        mapping = next(one for one in proc.maps(target.pid) if one.start == target.start)
        small = Region(0, 512, 0, target.start, 0, 4096, "small", mapping)
        large = Region(512, 1024, 2 << 20, target.start + (4 << 20), 4 << 20, 2 << 20, "large", mapping)
        with Guest("target", target.pid, (small, large)) as made:
            yield made


def test_pages_of_a_run_are_one_span(guest: Guest) -> None:
    start, after = guest.regions[0].hva, guest.regions[1].hva
    places = places_of(guest, np.array([0, 1, 2, 511, 512, 1024]))
    assert places.spans.tolist() == [[start, 3 * 4096], [start + 511 * 4096, 4096], [after, 4 << 20]]
    assert places.span.tolist() == [0, 0, 0, 1, 2, 2]
    assert places.addresses[-1] == after + (2 << 20)
    nothing = places_of(guest, np.array([], dtype=np.int64))
    assert len(nothing.spans) == len(nothing.span) == 0


def test_a_large_page_is_zapped_by_its_first(guest: Guest) -> None:
    assert heads(guest, np.array([3, 4, 513, 900, 1535])).tolist() == [3, 4, 512, 1024]


def test_large_pages_are_zapped_by_their_own_process(guest: Guest) -> None:
    assert isinstance(open_zap(guest, Running(guest.pid)), Dontneed)
