"""Snapshots' files: what was written is read, what was altered is refused with the offset."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, NotFoundError, OutboardError, RefusedError
from outboard.pages import PAGE_SIZE
from outboard.pages.residency import Where
from outboard.stores import snapshot_format
from outboard.stores.snapshot import SnapshotStore
from outboard.stores.snapshot_format import Kind
from tests.support.snapshots import memory_of, name, write


def content_of(store: SnapshotStore) -> NDArray[np.uint8]:
    """All memory, as a guest would get it."""
    found = np.zeros((store.where.size, PAGE_SIZE), dtype=np.uint8)
    away = np.flatnonzero(store.where == Where.SNAPSHOT)
    into = np.empty(away.size * PAGE_SIZE, dtype=np.uint8)
    store.fetch(store.locators[away], into)
    found[away] = into.reshape(-1, PAGE_SIZE)
    return found.reshape(-1)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def read_back(directory: Path, number: int) -> NDArray[np.uint8]:
    store = SnapshotStore(directory, name(number))
    try:
        return content_of(store)
    finally:
        store.close()


@given(some.integers(1, 90), some.integers(0, 1 << 30), some.integers(0, 5))
def test_what_was_written_is_read(tmp_path_factory: pytest.TempPathFactory, pages: int, seed: int, links: int) -> None:
    directory = tmp_path_factory.mktemp("snapshots")
    chance = np.random.default_rng(seed)
    memory = memory_of(pages, chance)
    parent = None
    changed = np.arange(pages)
    for number in range(links + 1):
        hot = tuple(chance.permutation(pages)[: chance.integers(0, pages + 1)].tolist())
        parent = write(directory, number, memory, parent, hot)
        assert np.array_equal(read_back(directory, number), memory)
        assert np.count_nonzero(parent.table.kinds == Kind.HERE) <= changed.size
        changed = chance.permutation(pages)[: chance.integers(0, pages + 1)]
        memory = memory.copy()
        memory.reshape(-1, PAGE_SIZE)[changed] = memory_of(changed.size, chance).reshape(-1, PAGE_SIZE)


def test_the_same_page_is_kept_once_and_one_of_the_parent_not_at_all(tmp_path: Path) -> None:
    memory = np.zeros((40, PAGE_SIZE), dtype=np.uint8)
    memory[10:30] = 7
    memory[30:40, 0] = np.arange(10) + 1
    first = write(tmp_path, 0, memory.reshape(-1))
    assert first.chunks.pages.sum() == 11
    assert np.count_nonzero(first.table.kinds == Kind.ZERO) == 10
    memory[0] = 9
    second = write(tmp_path, 1, memory.reshape(-1), first)
    assert second.chunks.pages.sum() == 1
    assert np.count_nonzero(second.table.kinds == Kind.PARENT) == 30
    assert np.array_equal(read_back(tmp_path, 1), memory.reshape(-1))


@pytest.mark.slow
def test_a_byte_altered_anywhere_is_refused_with_its_place(tmp_path: Path) -> None:
    memory = memory_of(60, np.random.default_rng(3))
    write(tmp_path, 0, memory)
    path = tmp_path / f"{name(0)}.snap"
    whole = path.read_bytes()
    step = max(1, len(whole) // 400)
    edges = [*range(snapshot_format.HEADER.size), *range(len(whole) - snapshot_format.FOOTER.size, len(whole))]
    for at in [*edges, *range(0, len(whole), step)]:
        altered = bytearray(whole)
        altered[at] ^= 0x40
        path.write_bytes(altered)
        with pytest.raises((RefusedError, DamagedPageError), match=r"is not what was written|does not hold") as caught:
            read_back(tmp_path, 0)
        said = re.search(r"byte (\d+) on", str(caught.value))
        assert said is not None, caught.value
        assert int(said[1]) <= at


def test_a_file_cut_anywhere_is_refused_with_its_length(tmp_path: Path) -> None:
    write(tmp_path, 0, memory_of(60, np.random.default_rng(4)))
    path = tmp_path / f"{name(0)}.snap"
    whole = path.read_bytes()
    for length in [*range(60), *range(60, len(whole), len(whole) // 200), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(RefusedError, match=rf"cut at byte {length}\b") as caught:
            SnapshotStore(tmp_path, name(0))
        assert caught.value.reason == "damaged-snapshot"
    path.write_bytes(whole + b"\0")
    with pytest.raises(RefusedError, match="from byte"):
        SnapshotStore(tmp_path, name(0))


def test_another_parent_is_refused(tmp_path: Path) -> None:
    memory = memory_of(20, np.random.default_rng(5))
    write(tmp_path, 1, memory, write(tmp_path, 0, memory))
    (tmp_path / f"{name(0)}.snap").unlink()
    with pytest.raises(NotFoundError, match=name(0)):
        SnapshotStore(tmp_path, name(1))
    memory[5] ^= 1
    write(tmp_path, 0, memory)
    with pytest.raises(RefusedError, match="another than the one"):
        SnapshotStore(tmp_path, name(1))


@pytest.mark.parametrize("bad", ["../web-20260101T000000-000000", "web", "", "web-20260101T000000-00000g", "a/b"])
def test_what_is_no_name_makes_no_path(tmp_path: Path, bad: str) -> None:
    with pytest.raises(NotFoundError, match="names no snapshot"):
        SnapshotStore(tmp_path, bad)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path, 0, memory_of(4, np.random.default_rng(6)))
    path = tmp_path / f"{name(0)}.snap"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutboardError):
        SnapshotStore(tmp_path, name(0))


def test_nothing_is_put_into_it_and_closing_lets_go(tmp_path: Path) -> None:
    write(tmp_path, 0, memory_of(4, np.random.default_rng(7)))
    before = descriptors()
    store = SnapshotStore(tmp_path, name(0))
    with pytest.raises(RefusedError):
        store.put(np.zeros(PAGE_SIZE, dtype=np.uint8))
    store.close()
    store.close()
    assert descriptors() == before
