"""How much of a live process's memory a disk holds, by image and by what the pages are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outboard.blocks.share import ClassShare, shares
from outboard.pages import PAGE_SIZE
from outboard.vmm.enlighten import PageClass
from outboard.vmm.spec import Disk
from tests.support.process_guest import guest_of
from tests.support.target import Target

PAGES = 4 << 8


def test_each_page_counts_once(tmp_path: Path) -> None:
    with Target(mebibytes=4) as target, guest_of(target) as guest:
        content = bytearray(200 * PAGE_SIZE)
        guest.memory.read_into(300, memoryview(content))
        (tmp_path / "disk").write_bytes(content)
        disks = [Disk(path=str(tmp_path / "disk"), read_only=True)]
        unasked = shares(guest, disks, tmp_path, None)
        assert (unasked.resident, unasked.matched, unasked.fixed) == (
            PAGES * PAGE_SIZE,
            200 * PAGE_SIZE,
            200 * PAGE_SIZE,
        )
        assert (unasked.zero, unasked.free, unasked.classes) == (PAGE_SIZE, None, [])
        assert unasked.unmatched == (PAGES - 201) * PAGE_SIZE
        classes = np.full(PAGES, PageClass.KERNEL, dtype=np.uint8)
        classes[:350] = PageClass.ACTIVE_FILE
        classes[480:600] = PageClass.FREE
        told = shares(guest, disks, tmp_path, classes)
        # Of the 120 that are free the disk holds 20.
        assert (told.free, told.unmatched) == (100 * PAGE_SIZE, (PAGES - 301) * PAGE_SIZE)
        by_kind = {one.kind: one for one in told.classes}
        assert by_kind["active file"] == ClassShare("active file", 350 * PAGE_SIZE, 50 * PAGE_SIZE, PAGE_SIZE)
        assert by_kind["kernel"].matched == 130 * PAGE_SIZE
        assert by_kind["free"] == ClassShare("free", 120 * PAGE_SIZE, 20 * PAGE_SIZE, 0)
        assert sum(one.resident for one in told.classes) == told.resident
        assert sum(one.matched for one in told.classes) == told.matched
        assert by_kind["slab"] == ClassShare("slab", 0, 0, 0)
