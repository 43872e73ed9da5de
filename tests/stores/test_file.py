"""Pages in a file: what is put comes back, or an error says that it does not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, OutboardError, StoreFullError
from outboard.stores.file import FileStore
from outboard.stores.store import Store
from tests.support.requirements import require

PAGE = 4096


def pages(*numbers: int) -> NDArray[np.uint8]:
    return np.concatenate([np.full(PAGE, number, dtype=np.uint8) for number in numbers])


def fetched(store: Store, locators: NDArray[np.uint64]) -> list[int]:
    into: NDArray[np.uint8] = np.empty(locators.size * PAGE, dtype=np.uint8)
    store.fetch(locators, into)
    rows = into.reshape(-1, PAGE)
    assert np.all(rows == rows[:, :1])
    return [int(number) for number in rows[:, 0]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    made = FileStore(tmp_path / "swap", 100)
    yield made
    made.close()
    made.close()


def test_what_was_put_comes_back_in_any_order(store: FileStore) -> None:
    locators = store.put(pages(1, 2, 3, 4))
    assert fetched(store, locators) == [1, 2, 3, 4]
    assert fetched(store, locators[[3, 0, 1]]) == [4, 1, 2]
    statistics = store.statistics()
    assert (statistics.used, statistics.room, statistics.put, statistics.fetched) == (4, 100, 4, 7)


def test_nothing_is_a_page_set_too(store: FileStore) -> None:
    locators = store.put(np.empty(0, dtype=np.uint8))
    assert fetched(store, locators) == []
    store.drop(locators)


def test_room_is_used_again_wherever_it_is(store: FileStore) -> None:
    locators = store.put(pages(*range(100)))
    store.drop(locators[[5, 50, 51, 99]])
    again = store.put(pages(200, 201, 202, 203))
    assert sorted(again.tolist()) == sorted(locators[[5, 50, 51, 99]].tolist())
    assert fetched(store, again) == [200, 201, 202, 203]
    assert fetched(store, locators[[4, 6, 49, 52, 98]]) == [4, 6, 49, 52, 98]


def test_a_full_store_keeps_what_it_has_and_nothing_of_the_new(store: FileStore) -> None:
    locators = store.put(pages(*range(98)))
    with pytest.raises(StoreFullError, match="room for 100 pages, 98 of them taken; 3 more"):
        store.put(pages(1, 2, 3))
    assert store.statistics().used == 98
    assert fetched(store, locators) == list(range(98))
    assert fetched(store, store.put(pages(7, 8))) == [7, 8]


@pytest.mark.parametrize("bit", [0, PAGE * 8 - 1, PAGE * 4])
def test_a_damaged_page_is_named_and_not_given_out(store: FileStore, bit: int) -> None:
    locators = store.put(pages(1, 2, 3))
    with store.path.open("r+b") as file:
        at = int(locators[1]) * PAGE + bit // 8
        file.seek(at)
        was = file.read(1)[0]
        file.seek(at)
        file.write(bytes([was ^ 1 << bit % 8]))
    with pytest.raises(DamagedPageError, match=f"1 of 3 pages read from .*swap.* the first is slot {locators[1]}"):
        fetched(store, locators)
    assert fetched(store, locators[[0, 2]]) == [1, 3]


def test_a_file_that_was_cut_is_damage_not_zeros(store: FileStore) -> None:
    locators = store.put(pages(1, 2, 3))
    os.truncate(store.path, PAGE + 100)
    with pytest.raises(DamagedPageError, match="ends before slot 1"):
        fetched(store, locators)


def test_a_page_of_zeros_where_none_was_put(store: FileStore) -> None:
    locators = store.put(pages(9))
    with store.path.open("r+b") as file:
        file.write(bytes(PAGE))
    with pytest.raises(DamagedPageError):
        fetched(store, locators)


def test_it_outlives_who_put_it_there(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        kept = FileStore(tmp_path / "swap", 100).put(pages(1, 2, 3, 4, 5))
        os.write(writer, kept.tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    locators = np.frombuffer(os.read(reader, 1000), dtype=np.uint64)
    store = FileStore(tmp_path / "swap", 100)
    assert fetched(store, locators) == [1, 2, 3, 4, 5]
    store.retain(locators[1:3])
    assert store.statistics().used == 2
    others = store.put(pages(*range(98)))
    assert not set(others.tolist()) & set(locators[1:3].tolist())
    assert fetched(store, locators[1:3]) == [2, 3]
    store.close()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    FileStore(tmp_path / "swap", 100).close()
    with pytest.raises(OutboardError, match="holds 100 entries, not 50; remove it"):
        FileStore(tmp_path / "swap", 50)


def test_a_place_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="open of the page file"):
        FileStore(tmp_path / "none" / "swap", 100)


def test_a_full_disk_leaves_the_pages_with_their_owner(tmp_path: Path) -> None:
    require("root")
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", where], check=True)
    try:
        store = FileStore(where / "swap", 100)
        kept = store.put(pages(1, 2, 3))
        with pytest.raises(StoreFullError, match=r"disk of .* is full: 40 pages stay"):
            store.put(pages(*range(40)))
        assert store.statistics().used == 3
        assert fetched(store, kept) == [1, 2, 3]
        store.close()
    finally:
        subprocess.run(["umount", where], check=True)
