"""Pages of a live process in a reserved swap file: they come back by a fault, wherever their blocks are."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.pager.pager import Pager
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.stores import moving
from outboard.stores.swap import SwapStore
from tests.support.cluster import wait_for
from tests.support.loops import fill, mounted, reserve
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 4
PAGES = MIB << 8


@pytest.fixture
def journal() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def engage(target: Target, disk: Path, journal: Path) -> Pager:
    store = SwapStore(reserve(disk / "swap", 8 << 20), "target", PAGES, journal)
    return Pager(guest_of(target), Residency(PAGES, journal), {Where.FILE: store})


@pytest.mark.parametrize("full", [False, True], ids=["with room", "on a full disk"])
def test_what_was_swapped_out_comes_back(
    tmp_path: Path, journal: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("root", "loop-file-systems")
    with mounted("ext4", tmp_path) as disk, Target(mebibytes=MIB) as target:
        pager = engage(target, disk, journal)
        if full:
            fill(disk)
            # As if somebody took each block that is nobody's for a moment.
            monkeypatch.setattr(moving, "move", lambda *_: False)
        before = (disk / "swap" / "reservation").stat().st_blocks
        assert pager.evict(PageSet.full(PAGES), Where.FILE) == PAGES
        gone = before - (disk / "swap" / "reservation").stat().st_blocks
        assert gone == (0 if full else MIB * 2048)
        assert target.ask("r 700") == "700"
        # A successor finds the others.
        pager.close()
        pager = engage(target, disk, journal)
        assert target.ask("t").split()[1] == str(PAGES * (PAGES - 1) // 2)
        # Who touched the last page is woken a moment before that is counted.
        successor = pager
        wait_for(lambda: successor.statistics().faults.file == PAGES - 2, "the count of the faults")
        assert pager.failure is None
        pager.release()
