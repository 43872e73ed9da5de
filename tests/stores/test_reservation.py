"""A reservation: its blocks move and come back, and together they stay the same to the block."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import KernelError, OutboardError, RefusedError, StoreFullError
from outboard.linux import fallocate, fiemap
from outboard.stores.moving import UNIT
from outboard.stores.reservation import SPARE, Reservation, SwapFile
from tests.support.loops import fill, mounted, reserve
from tests.support.requirements import require

MIB = 1 << 20
WAYS = {"ext4-lent": "lend", "ext4": "allocate", "xfs": "clone", "xfs-exchange": "exchange"}
MOVING = tuple(kind for kind in WAYS if kind != "ext4-lent")
NOTHING = np.empty(0, dtype=np.uint8)


@pytest.fixture(params=MOVING)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Iterator[Path]:
    require("root", "loop-file-systems")
    with mounted(kind, tmp_path) as made:
        yield made


def blocks(directory: Path) -> int:
    """What stat(2) says, of everything that is the reservation's or a swap file."""
    found = [directory / "reservation", directory / "ballast", *(directory / "vms").iterdir()]
    return sum(path.stat().st_blocks for path in found)


def mapped(fd: int, unit: int) -> int:
    return sum(one.length for one in fiemap.extents(fd, unit * UNIT, UNIT))


def test_units_move_and_come_back(place: Path, kind: str) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 16 * MIB)
    before = blocks(directory)
    assert before * 512 >= (16 + SPARE) * MIB
    assert reservation.statistics().way == WAYS[kind]
    file = reservation.open("web", 16)
    for unit in (3, 9, 4):
        assert reservation.take(file, unit, NOTHING)[0] is None
        assert mapped(file.fd, unit) == UNIT
        assert blocks(directory) == before
    assert os.pread(file.fd, 0, 0) == b""
    held = reservation.held(file, 16)
    assert np.flatnonzero(held).tolist() == [3, 4, 9]
    now = reservation.statistics()
    assert (now.here >> 20, now.moved >> 20, now.lent, now.lost) == (16 + SPARE - 3, 3, 0, 0)
    assert now.blocks == now.blocks_reserved == before
    assert (directory / "vms" / "web").stat().st_blocks * 512 >= 3 * MIB
    assert reservation.give_back(file, [3, 4]) == [3, 4]
    assert blocks(directory) == before
    reservation.discard("web")
    assert blocks(directory) == before
    assert reservation.statistics().moved == 0
    os.close(file.fd)
    reservation.close()
    reservation.close()


def test_many_moves_leave_the_blocks_as_they_were_to_the_block(place: Path) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 60 * MIB)
    before = blocks(directory)
    chance = random.Random(5)
    files = [reservation.open(f"vm-{number}", 20) for number in range(3)]
    held: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for _ in range(300):
        which = chance.randrange(3)
        unit = chance.randrange(20)
        if unit in held[which]:
            assert reservation.give_back(files[which], [unit]) == [unit]
            held[which].remove(unit)
        else:
            assert reservation.take(files[which], unit, NOTHING)[0] is None
            held[which].add(unit)
        assert blocks(directory) == before
    for file in files:
        reservation.discard(file.name)
        os.close(file.fd)
    assert blocks(directory) == before
    reservation.close()


@pytest.mark.parametrize("kind", ["ext4-lent"], indirect=True)
def test_where_blocks_cannot_move_units_are_lent(place: Path, kind: str) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 16 * MIB)
    before = blocks(directory)
    assert reservation.statistics().way == WAYS[kind]
    file = reservation.open("web", 16)
    lent = [reservation.take(file, unit, NOTHING)[0] for unit in (3, 9, 4)]
    assert lent == [0, 1, 2]
    assert os.fstat(file.fd).st_blocks == 0
    now = reservation.statistics()
    assert (now.here >> 20, now.moved, now.lent >> 20, now.lost) == (16 + SPARE - 3, 0, 3, 0)
    assert now.blocks == now.blocks_reserved == before == blocks(directory)
    reservation.return_lent(file, [1])
    # Somebody else's stays.
    other = reservation.open("other", 1)
    reservation.return_lent(other, [2])
    os.close(other.fd)
    assert reservation.lent_to(file) == {0, 2}
    assert reservation.take(file, 9, NOTHING) == (1, False)
    reservation.discard("web")
    assert reservation.statistics().here == (16 + SPARE) * MIB
    os.close(file.fd)
    reservation.close()


@pytest.mark.parametrize("kind", ["ext4-lent"], indirect=True)
def test_swap_files_can_be_made_thin_later_and_thick_again(place: Path) -> None:
    directory = place / "swap"
    first = Reservation(directory, 8 * MIB, thin=False)
    before = blocks(directory)
    file = first.open("web", 8)
    assert first.take(file, 0, NOTHING)[0] == 0
    thin = Reservation(directory, 8 * MIB, thin=True)
    assert thin.take(file, 1, NOTHING)[0] is None
    assert first.statistics().way == "lend"
    last = Reservation(directory, 8 * MIB, thin=False)
    assert last.take(file, 2, NOTHING)[0] == 2
    now = last.statistics()
    assert (now.way, now.moved, now.lent, now.blocks) == ("lend", MIB, 2 * MIB, before)
    last.discard("web")
    assert (last.statistics().here, blocks(directory)) == ((8 + SPARE) * MIB, before)
    os.close(file.fd)
    for reservation in (first, thin, last):
        reservation.close()


def test_on_a_full_disk_what_cannot_move_is_lent(place: Path) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 24 * MIB)
    file = reservation.open("web", 40)
    before = blocks(directory)
    fill(place)
    for unit in range(24):
        lent, _ = reservation.take(file, unit, NOTHING)
        assert lent is not None or mapped(file.fd, unit) == UNIT
        assert blocks(directory) <= before
    # The last may be lent as well: what is lent is not on top of what is reserved.
    for unit in range(24, 24 + SPARE - reservation.statistics().lost // UNIT):
        reservation.take(file, unit, NOTHING)
    with pytest.raises(StoreFullError, match="more was promised than the 24 MiB reserved"):
        reservation.take(file, 39, NOTHING)
    (place / "filler").unlink()
    reservation.discard("web")
    os.close(file.fd)
    again = reservation.open("web", 24)
    reservation.take(again, 0, NOTHING)
    assert blocks(directory) == before
    now = reservation.statistics()
    assert (now.lost, now.lent, now.blocks) == (0, 0, before)
    os.close(again.fd)
    reservation.close()


def test_who_died_over_a_move_is_cleaned_up_after_on_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 24 * MIB)
    file = reservation.open("web", 24)
    before = blocks(directory)

    class Death(BaseException):
        pass

    # The unit is in both files, or in the one; and for want of free blocks XFS punches no hole.
    def die(*_: object) -> None:
        raise Death

    refused: list[int] = []

    def punch_as_xfs_does(fd: int, offset: int, length: int) -> None:
        if not refused and (directory / "ballast").stat().st_size:
            refused.append(offset)
            raise KernelError("fallocate(PUNCH_HOLE)", errno.ENOSPC)
        punch(fd, offset, length)

    punch = fallocate.punch
    monkeypatch.setattr(fallocate, "punch", die)
    monkeypatch.setattr(Reservation, "_balance", die)
    with pytest.raises(Death):
        reservation.take(file, 3, NOTHING)
    monkeypatch.undo()
    fill(place)
    monkeypatch.setattr(fallocate, "punch", punch_as_xfs_does)
    reservation.discard("web")
    assert (reservation.statistics().lost, blocks(directory)) == (0, before)
    assert refused
    os.close(file.fd)
    reservation.close()


def test_a_thief_on_a_full_disk_gets_no_more_than_the_spare_units(place: Path) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 24 * MIB)
    file = reservation.open("web", 24)
    before = blocks(directory)
    fill(place)
    free = list(range(24))
    ending = threading.Event()

    def steal() -> None:
        while not ending.is_set():
            fill(place)

    thief = threading.Thread(target=steal)
    thief.start()
    try:
        for _ in range(3):
            lent = [reservation.take(file, unit, NOTHING)[0] for unit in free]
            assert not [unit for unit, k in zip(free, lent, strict=True) if k is None and mapped(file.fd, unit) != UNIT]
            reservation.return_lent(file, [k for k in lent if k is not None])
            held = np.flatnonzero(reservation.held(file, 24)).tolist()
            free = sorted(set(range(24)) - set(held) | set(reservation.give_back(file, held)))
    finally:
        ending.set()
        thief.join()
    now = reservation.statistics()
    assert now.lost <= SPARE * UNIT
    # Of the ballast too, somebody may have had a little.
    assert before - blocks(directory) <= now.lost // 512 + (5 * MIB) // 512
    (place / "filler").unlink()
    reservation.discard("web")
    os.close(file.fd)
    last = reservation.open("last", 1)
    reservation.take(last, 0, NOTHING)
    reservation.discard("last")
    os.close(last.fd)
    assert blocks(directory) == before
    reservation.close()


def test_who_comes_later_finds_it(place: Path) -> None:
    first = reserve(place / "swap", 8 * MIB)
    second = reserve(place / "swap", 8 * MIB)
    one, other = first.open("one", 8), second.open("other", 8)
    first.take(one, 0, NOTHING)
    second.take(other, 5, NOTHING)
    assert first.statistics() == second.statistics()
    assert second.statistics().moved == 2 * MIB
    assert sorted(first.names()) == ["one", "other"]
    with pytest.raises(RefusedError, match="can be reserved there when no VM is managed"):
        reserve(place / "swap", 16 * MIB)
    first.discard("one")
    first.discard("other")
    first.discard("nobody")
    grown = reserve(place / "swap", 16 * MIB)
    assert grown.statistics().promisable == 16 * MIB
    for file in (one, other):
        os.close(file.fd)
    for reservation in (first, second, grown):
        reservation.close()


def test_after_a_power_cut_everything_comes_back(place: Path) -> None:
    directory = place / "swap"
    reservation = reserve(directory, 8 * MIB)
    before = blocks(directory)
    file = reservation.open("web", 8)
    for unit in range(4):
        reservation.take(file, unit, NOTHING)
    fallocate.punch(reservation.fileno(), 7 * UNIT, UNIT)
    os.close(file.fd)
    reservation.close()
    state = directory / "state"
    text = state.read_bytes()
    at = text.index(b'"boot":"') + 8
    state.write_bytes(text[:at] + b"X" + text[at + 1 :])
    again = reserve(directory, 8 * MIB)
    now = again.statistics()
    assert (now.here, now.moved, now.lost) == ((8 + SPARE) * MIB, 0, 0)
    assert blocks(directory) == before
    assert not list((directory / "vms").iterdir())
    again.close()


def test_what_does_not_fit_is_refused_and_leaves_nothing(place: Path) -> None:
    with pytest.raises(RefusedError, match=r"a swap reservation of 10\d\d MiB does not fit into") as caught:
        reserve(place / "swap", 1000 * MIB)
    assert caught.value.reason == "swap-space"
    assert sorted(path.name for path in (place / "swap").iterdir()) == ["state", "vms"]


def test_memory_is_no_place_for_it() -> None:
    with pytest.raises(RefusedError, match="which is memory") as caught:
        Reservation(Path("/dev/shm/outboard-test-swap"), 8 * MIB)
    assert caught.value.reason == "swap-file-system"
    Path("/dev/shm/outboard-test-swap/state").unlink()
    Path("/dev/shm/outboard-test-swap/vms").rmdir()
    Path("/dev/shm/outboard-test-swap").rmdir()


def test_what_is_no_record_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"{nonsense")
    (tmp_path / "vms").mkdir()
    with pytest.raises(OutboardError, match="is no record of a reservation"):
        Reservation(tmp_path, 8 * MIB)


def test_who_only_looks_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"8 MiB are not reserved in .* yet") as caught:
        Reservation(tmp_path, 8 * MIB, make=False)
    assert caught.value.reason == "swap-not-made"
    made = Reservation(tmp_path, 8 * MIB)
    with pytest.raises(RefusedError, match="16 MiB are not reserved"):
        Reservation(tmp_path, 16 * MIB, make=False)
    assert made.statistics() == Reservation(tmp_path, 8 * MIB, make=False).statistics()
    made.close()


def test_odd_sizes_are_refused(tmp_path: Path) -> None:
    for size in (0, -MIB, MIB + 1):
        with pytest.raises(RefusedError, match="multiple of 1 MiB"):
            Reservation(tmp_path, size)


def test_who_dies_while_he_holds_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    reservation = Reservation(tmp_path / "swap", 8 * MIB)
    child = os.fork()
    if child == 0:
        inner = Reservation(tmp_path / "swap", 8 * MIB)
        with inner._locked():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert reservation.statistics().moved == 0
    reservation.close()


def test_a_swap_file_is_a_name(tmp_path: Path) -> None:
    reservation = Reservation(tmp_path / "swap", 8 * MIB)
    file = reservation.open("web", 4)
    assert isinstance(file, SwapFile)
    assert (tmp_path / "swap" / "vms" / "web").stat().st_size == 4 * UNIT
    os.close(file.fd)
    reservation.close()
