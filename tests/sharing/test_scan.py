"""Digests tell equal pages, and pages that are being written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import memfd
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.sharing.scan import NO_DIGEST, SECRET, Digests, digests

PAGES = 300


def secret() -> NDArray[np.uint8]:
    return np.frombuffer(bytes(range(SECRET)), dtype=np.uint8).copy()


@pytest.fixture
def file() -> Iterator[int]:
    fd = memfd.create("test-scan", PAGES * PAGE_SIZE)
    os.pwrite(fd, b"".join((page % 7).to_bytes(4, "little") * 1024 for page in range(PAGES)), 0)
    try:
        yield fd
    finally:
        os.close(fd)


def regions(fd: int) -> NDArray[np.int64]:
    """Two regions that lie the other way round in the file."""
    return np.array([[0, 100, 0, 200 * PAGE_SIZE, fd], [100, 200, 0, 0, fd]], dtype=np.int64)


def test_equal_pages_have_equal_digests(file: int) -> None:
    known = Digests(PAGES, secret())
    known.scan(regions(file), PageSet.full(PAGES))
    contents = [(page + 200) % 7 for page in range(100)] + [page % 7 for page in range(200)]
    assert len(np.unique(known.now)) == 7
    for value in range(7):
        same = known.now[np.array(contents) == value]
        assert (same == same[0]).all()
    assert not known.stable.any()
    known.scan(regions(file), PageSet.full(PAGES))
    assert known.stable.all()
    assert known.zeros() == PageSet.from_mask(np.array(contents) == 0)
    assert known.statistics().stable == PAGES
    assert known.statistics().bytes_per_second > 0


def test_a_page_that_is_written_or_away_is_not_stable(file: int) -> None:
    known = Digests(PAGES, secret())
    known.scan(regions(file), PageSet.full(PAGES))
    os.pwrite(file, b"x", 5 * PAGE_SIZE)
    known.scan(regions(file), PageSet.full(PAGES) - PageSet.from_numbers(PAGES, np.array([7])))
    assert np.flatnonzero(~known.stable).tolist() == [7, 105]
    assert known.now[7] == NO_DIGEST


def test_another_secret_makes_other_digests() -> None:
    pages = np.arange(4 * PAGE_SIZE, dtype=np.int64).astype(np.uint8)
    ours, theirs = digests(pages, secret()), digests(pages, secret()[::-1].copy())
    assert (ours != theirs).all()
    # And none is the one without a secret, which anybody can make.
    assert int(ours[0]) != xxhash.xxh3_64_intdigest(pages[:PAGE_SIZE].tobytes())


def test_a_file_that_is_too_short_is_said_to_be(file: int) -> None:
    os.ftruncate(file, 10 * PAGE_SIZE)
    with pytest.raises(KernelError, match="digest"):
        Digests(PAGES, secret()).scan(regions(file), PageSet.full(PAGES))
