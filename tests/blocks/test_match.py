"""Pages of a live process, found on a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outboard.blocks.match import match
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.stores.disk import DiskStore, Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images
from outboard.vmm.spec import Disk
from tests.support.process_guest import guest_of
from tests.support.target import Target

PAGES = 4 << 8


def test_pages_of_a_process_are_found_on_a_disk(tmp_path: Path) -> None:
    with Target(mebibytes=4) as target, guest_of(target) as guest:
        content = bytearray(200 * PAGE_SIZE)
        guest.memory.read_into(300, memoryview(content))
        (tmp_path / "disk").write_bytes(bytes(PAGE_SIZE) + content)
        with Images([Disk(path=str(tmp_path / "disk"), read_only=True)]) as images:
            finder = Finder(images.files, [index.open_index(layer, tmp_path) for layer in images.layers])
            found = match(guest, PageSet.full(PAGES), finder)
            # The target's pages hold their numbers: page 0 is zeros, and no other is like it.
            assert found.zero.tolist() == [0]
            assert found.match.pages.tolist() == list(range(300, 500))
            assert found.match.block.tolist() == list(range(1, 201))
            assert target.ask("w 310 9") == "written"
            again = match(guest, PageSet.from_numbers(PAGES, np.array([309, 310, 311])), finder)
            assert again.match.pages.tolist() == [309, 311]
            into = np.empty(200 * PAGE_SIZE, dtype=np.uint8)
            DiskStore(images.files).fetch(found.match.locators, found.match.digest, into)
            assert bytes(into) == bytes(content)
        assert match(guest, PageSet(PAGES), finder).match.pages.size == 0
