"""Pages in a swap file whose blocks come out of a reservation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, StoreFullError
from outboard.stores import moving
from outboard.stores.moving import UNIT, UNIT_PAGES
from outboard.stores.reservation import Reservation
from outboard.stores.store import Store
from outboard.stores.swap import SwapStore
from tests.support.loops import KINDS, fill, mounted, reserve
from tests.support.requirements import require

PAGE = 4096
MIB = 1 << 20


def pages(*numbers: int) -> NDArray[np.uint8]:
    return np.concatenate([np.full(PAGE, number % 251, dtype=np.uint8) for number in numbers])


def fetched(store: Store, locators: NDArray[np.uint64]) -> list[int]:
    into: NDArray[np.uint8] = np.empty(locators.size * PAGE, dtype=np.uint8)
    store.fetch(locators, into)
    rows = into.reshape(-1, PAGE)
    assert np.all(rows == rows[:, :1])
    return [int(number) for number in rows[:, 0]]


class Place:
    """A disk with a reservation of 16 MiB on it, and a store for 4 MiB."""

    def __init__(self, disk: Path, beside: Path) -> None:
        self.disk, self.beside = disk, beside
        self.directory = disk / "swap"
        beside.mkdir()
        self.store = self.open()

    def open(self) -> SwapStore:
        return SwapStore(reserve(self.directory, 16 * MIB), "web", 4 * UNIT_PAGES, self.beside)

    def blocks(self) -> int:
        found = [self.directory / "reservation", self.directory / "ballast", *(self.directory / "vms").iterdir()]
        return sum(path.stat().st_blocks for path in found)

    def mebibytes(self) -> int:
        """Its own, and those that are lent to it."""
        own = (self.directory / "vms" / "web").stat().st_blocks // 2048
        return own + int(np.count_nonzero(self.store.lent >= 2))


@pytest.fixture(params=(*KINDS, "ext4"))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    require("root", "loop-file-systems")
    with mounted(request.param, tmp_path) as disk:
        made = Place(disk, tmp_path / "beside")
        yield made
        made.store.close()
        made.store.close()


def test_what_was_put_comes_back_in_any_order(place: Place) -> None:
    store = place.store
    locators = store.put(pages(1, 2, 3, 4))
    assert fetched(store, locators) == [1, 2, 3, 4]
    assert fetched(store, locators[[3, 0, 1]]) == [4, 1, 2]
    statistics = store.statistics()
    assert (statistics.used, statistics.room, statistics.put, statistics.fetched) == (4, 1024, 4, 7)
    nothing = store.put(np.empty(0, dtype=np.uint8))
    assert fetched(store, nothing) == []


def test_a_swap_file_is_as_thin_as_it_can_be(place: Place) -> None:
    store, before = place.store, place.blocks()
    assert place.mebibytes() == 0
    locators = store.put(pages(*range(300)))
    assert place.mebibytes() == 2
    more = store.put(pages(*range(700)))
    assert place.mebibytes() == 4
    assert fetched(store, locators) == [number % 251 for number in range(300)]
    assert fetched(store, more) == [number % 251 for number in range(700)]
    assert place.blocks() == before
    store.drop(locators)
    store.drop(more)
    store.trim()
    assert place.mebibytes() == 2
    store.trim(0)
    assert place.mebibytes() == 0
    assert place.blocks() == before


def test_room_is_used_again_wherever_it_is(place: Place) -> None:
    store = place.store
    locators = store.put(pages(*range(1024)))
    with pytest.raises(StoreFullError, match=r"1024 of the 1024 pages .* of web are; 1 more"):
        store.put(pages(1))
    gone = np.random.default_rng(3).choice(1024, 100, replace=False)
    store.drop(locators[gone])
    again = store.put(pages(*range(100)))
    assert fetched(store, again) == list(range(100))
    kept = np.setdiff1d(np.arange(1024), gone)
    assert fetched(store, locators[kept]) == [int(number) % 251 for number in kept]
    assert place.mebibytes() == 4


def test_a_full_disk_takes_no_swap_out_away(place: Place) -> None:
    store, before = place.store, place.blocks()
    fill(place.disk)
    chance = random.Random(4)
    there: dict[int, int] = {}
    for _ in range(60):
        if len(there) < 800:
            numbers = [chance.randrange(251) for _ in range(chance.randrange(1, 224))]
            there |= dict(zip(store.put(pages(*numbers)).tolist(), numbers, strict=True))
        gone = chance.sample(sorted(there), len(there) // 3)
        store.drop(np.array(gone, dtype=np.uint64))
        for slot in gone:
            del there[slot]
        store.trim(chance.randrange(3))
        assert place.blocks() <= before
    slots = sorted(there)
    assert fetched(store, np.array(slots, dtype=np.uint64)) == [there[slot] for slot in slots]
    store.drop(np.array(slots, dtype=np.uint64))
    (place.disk / "filler").unlink()
    store.trim(0)
    store.put(pages(1))
    assert place.blocks() == before


def test_a_page_in_a_lent_unit_is_kept_through_a_death(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "move", lambda *_: False)
    store = place.store
    locators = store.put(pages(*range(300)))
    assert (place.directory / "vms" / "web").stat().st_blocks < 2048
    assert np.all(store.lent[:2] >= 2)
    lender = Reservation(place.directory, 16 * MIB)
    assert lender.statistics().lent == 2 * UNIT
    store.close()
    monkeypatch.undo()
    place.store = store = place.open()
    store.retain(locators)
    more = store.put(pages(*range(700)))
    assert fetched(store, locators) == [number % 251 for number in range(300)]
    assert fetched(store, more) == [number % 251 for number in range(700)]
    store.drop(locators)
    store.drop(more)
    store.trim(0)
    assert lender.statistics().lent == 0
    assert lender.statistics().here == lender.units * UNIT
    lender.close()


def test_after_a_crash_what_is_referred_to_is_kept_and_nothing_else(place: Place) -> None:
    store, before = place.store, place.blocks()
    locators = store.put(pages(*range(1000)))
    store.close()
    place.store = store = place.open()
    store.retain(locators[:10])
    assert place.mebibytes() == 1
    assert fetched(store, locators[:10]) == list(range(10))
    assert place.blocks() == before


def test_a_damaged_page_is_named_and_not_given_out(place: Place) -> None:
    store = place.store
    locators = store.put(pages(1, 2, 3))
    unit, inside = divmod(int(locators[1]), UNIT_PAGES)
    lent = int(store.lent[unit]) - 2
    path = place.directory / ("reservation" if lent >= 0 else "vms/web")
    with path.open("r+b") as file:
        file.seek(((lent if lent >= 0 else unit) * UNIT_PAGES + inside) * PAGE + 77)
        file.write(b"x")
    with pytest.raises(DamagedPageError, match=f"1 of 3 pages read from swap file web .* slot {locators[1]}"):
        fetched(store, locators)
    assert fetched(store, locators[[0, 2]]) == [1, 3]
