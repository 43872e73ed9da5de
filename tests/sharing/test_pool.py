"""The pool keeps one copy of a content, at a place that nobody can choose, for as long as somebody names it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import KernelError, StoreFullError
from outboard.pages import PAGE_SIZE
from outboard.sharing.pool import Pool


@pytest.fixture
def path() -> Iterator[Path]:
    made = Path(f"/dev/shm/outboard-test-pool-{os.getpid()}")
    try:
        yield made
    finally:
        made.unlink(missing_ok=True)


def content(*values: int) -> NDArray[np.uint8]:
    return np.repeat(np.array(values, dtype=np.uint8), PAGE_SIZE)


def put(pool: Pool, *values: int) -> NDArray[np.int64]:
    data = content(*values)
    return pool.put(data, [pool.digest(page.data) for page in data.reshape(-1, PAGE_SIZE)])


def test_what_was_put_is_found_by_its_content(path: Path) -> None:
    pool = Pool(path, np.random.default_rng(1), slots=1000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    slots = put(pool, 1, 2, 3)
    assert np.diff(slots).tolist() == [1, 1]
    assert pool.find(pool.digest(content(2).data)) == slots[1]
    assert pool.find(pool.digest(content(9).data)) == -1
    assert (pool.read(slots) == content(1, 2, 3)).all()
    assert pool.used() == 3
    pool.close()
    pool.close()


def test_a_digest_says_nothing_without_the_salt(path: Path) -> None:
    one, other = (Pool(path, np.random.default_rng(1), slots=10) for _ in range(2))
    assert one.digest(content(1).data) != other.digest(content(1).data)
    one.close()
    other.close()


def test_what_nobody_names_is_freed(path: Path) -> None:
    pool = Pool(path, np.random.default_rng(1), slots=1000)
    slots = put(pool, 1, 2, 3)
    assert path.stat().st_blocks * 512 == 3 * PAGE_SIZE
    assert pool.retain(slots[1:2]) == 2
    assert path.stat().st_blocks * 512 == PAGE_SIZE
    assert pool.find(pool.digest(content(1).data)) == -1
    assert pool.find(pool.digest(content(2).data)) == slots[1]
    # A successor is told what is in use, and finds out what it holds.
    pool.close()
    pool = Pool(path, np.random.default_rng(2), slots=1000)
    assert pool.retain(slots[1:2]) == 0
    assert pool.find(pool.digest(content(2).data)) == slots[1]
    assert pool.slots().tolist() == slots[1:2].tolist()
    pool.close()


def test_places_are_random_and_in_a_row_only_where_there_is_one(path: Path) -> None:
    pool = Pool(path, np.random.default_rng(3), slots=64)
    first = {int(put(pool, value)[0]) for value in range(1, 33)}
    assert sorted(first) != list(range(32))
    slots = put(pool, *range(100, 132))
    assert len(first | set(slots.tolist())) == 64
    with pytest.raises(StoreFullError, match="0 free slots of 64"):
        put(pool, 200)
    pool.close()


def test_no_memory_leaves_nothing_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(path, np.random.default_rng(3), slots=64)
    monkeypatch.setattr(os, "pwrite", lambda *_: 17)
    with pytest.raises(StoreFullError, match="17 bytes"):
        put(pool, 1)
    monkeypatch.undo()
    assert pool.used() == 0
    pool.close()
    with pytest.raises(KernelError, match="sharing pool"):
        Pool(path / "nowhere", np.random.default_rng(3))
