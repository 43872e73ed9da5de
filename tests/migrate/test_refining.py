"""What a coarse trace reports, refined by what was sent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from outboard.migrate.outbox import Outbox
from outboard.migrate.refining import note_digests, refined
from outboard.pages import LARGE
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest
from tests.support.process_guest import guest_of
from tests.support.target import Target


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Target(mebibytes=8) as target, guest_of(target) as guest:
        yield guest


def sent(guest: Guest, first: int, count: int, *, as_zeros: int | None = None) -> Outbox:
    """All of a run has gone, one page of it as zeros whatever it holds."""
    outbox = Outbox(guest.pages, digested=True)
    assert outbox.digests is not None
    content = np.empty(count * 4096, dtype=np.uint8)
    guest.memory.read_into(first, content.data)
    zero = np.zeros(count, dtype=np.bool_)
    if as_zeros is not None:
        zero[as_zeros - first] = True
    note_digests(outbox.digests, [(first, count)], content, zero)
    outbox.sent[first : first + count] = 1
    return outbox


def pages(guest: Guest, *runs: tuple[int, int]) -> PageSet:
    return PageSet.from_runs(guest.pages, np.array(runs))


def test_of_a_whole_block_what_differs_is_left(guest: Guest) -> None:
    outbox = sent(guest, 0, 2 * LARGE, as_zeros=9)
    for page in (3, LARGE - 1, LARGE + 7):
        guest.memory.write(page, memoryview(bytes([1]) * 4096))
    found = refined(guest, outbox, pages(guest, (0, LARGE)))
    # The first page is all zeros, the ninth was not.
    assert found == PageSet.from_numbers(guest.pages, np.array([3, 9, LARGE - 1]))


def test_what_is_reported_page_by_page_is_believed(guest: Guest) -> None:
    outbox = sent(guest, 0, LARGE)
    written = pages(guest, (1, LARGE - 1))
    assert refined(guest, outbox, written) == written


def test_what_was_not_sent_stays(guest: Guest) -> None:
    outbox = sent(guest, 0, 100)
    found = refined(guest, outbox, pages(guest, (0, LARGE), (2 * LARGE, LARGE)))
    assert found == pages(guest, (100, LARGE - 100), (2 * LARGE, LARGE))


def test_without_digests_nothing_is_looked_into(guest: Guest) -> None:
    outbox = Outbox(guest.pages)
    outbox.sent[:] = 1
    written = pages(guest, (0, LARGE))
    assert refined(guest, outbox, written) == written
