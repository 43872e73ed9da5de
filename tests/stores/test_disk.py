"""Pages that equal blocks of images: found, read back, and refused when they are no longer there."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import DamagedPageError
from outboard.linux import native
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.stores import disk
from outboard.stores.disk import NONE, DiskStore, Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images
from outboard.vmm.spec import Disk
from tests.support.cluster import wait_for

BLOCKS = 600


def blocks(seed: int, count: int) -> NDArray[np.uint8]:
    return np.frombuffer(random.Random(seed).randbytes(count * PAGE_SIZE), dtype=np.uint8).copy()


class Scene:
    """Two raw disks, the second with a hole in its middle, the same block twice, and an end that is no whole block."""

    def __init__(self, directory: Path) -> None:
        self.one, self.two = blocks(1, BLOCKS), blocks(2, 64)
        self.paths = directory / "one", directory / "two"
        self.paths[0].write_bytes(self.one.tobytes())
        with self.paths[1].open("wb") as file:
            file.write(self.two.tobytes())
            file.seek(1 << 20)
            file.write(self.two.tobytes() + b"tail")
        self.images = Images([Disk(path=str(path), read_only=True) for path in self.paths])
        self.directory = directory / "state"
        self.indexes = [index.open_index(layer, self.directory) for layer in self.images.layers]
        self.finder = Finder(self.images.files, [*self.indexes])
        self.store = DiskStore(self.images.files)

    def spoil(self, block: int) -> None:
        with self.paths[0].open("r+b") as file:
            file.seek(block * PAGE_SIZE + 100)
            file.write(b"?")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def page_of(content: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    return content[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


def test_pages_are_found_where_their_content_lies(scene: Scene) -> None:
    content = np.concatenate(
        [
            page_of(scene.one, 5),
            blocks(9, 1),
            page_of(scene.two, 3),
            np.zeros(PAGE_SIZE, np.uint8),
            page_of(scene.one, 7),
        ]
    )
    digests = page_digests(content)
    image, block = scene.finder.find(content, digests)
    assert image.tolist() == [0, NONE, 1, NONE, 0]
    assert block[[0, 2, 4]].tolist() == [5, 3, 7]
    skip = np.array([True, False, False, False, False])
    assert scene.finder.find(content, digests, skip)[0].tolist() == [NONE, NONE, 1, NONE, 0]
    found = image != NONE
    into = np.empty(3 * PAGE_SIZE, dtype=np.uint8)
    scene.store.fetch(disk.locators(image[found], block[found]), digests[found], into)
    assert bytes(into) == bytes(np.concatenate([page_of(scene.one, 5), page_of(scene.two, 3), page_of(scene.one, 7)]))


def test_every_block_is_found_and_an_index_takes_thirteen_bytes_of_it(scene: Scene) -> None:
    image, block = scene.finder.find(scene.one, page_digests(scene.one))
    assert (image == 0).all()
    assert block.tolist() == list(range(BLOCKS))
    assert scene.indexes[1].keys.size == 64
    assert scene.indexes[0].size <= 16 * BLOCKS


def test_an_index_is_made_once_and_again_when_the_image_has_changed(scene: Scene) -> None:
    layer = scene.images.layers[0]
    assert scene.indexes[0].built
    again = index.open_index(layer, scene.directory)
    assert not again.built
    assert np.array_equal(again.keys, scene.indexes[0].keys)
    assert np.array_equal(again.blocks, scene.indexes[0].blocks)
    assert index.load(scene.images.layers[1], scene.directory / "nowhere") is None
    scene.spoil(3)
    assert index.load(layer, scene.directory) is None
    assert index.open_index(layer, scene.directory).built


@pytest.mark.parametrize("harm", [lambda raw: raw[:-1], lambda raw: raw[:10], lambda raw: raw[:200] + b"x" + raw[201:]])
def test_a_damaged_index_is_made_anew(scene: Scene, harm: object) -> None:
    for path in scene.directory.iterdir():
        path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    assert [index.open_index(layer, scene.directory).built for layer in scene.images.layers] == [True, True]


def test_what_an_old_index_says_is_compared_and_not_believed(scene: Scene) -> None:
    digests = page_digests(scene.one)
    scene.spoil(5)
    image, _ = scene.finder.find(scene.one, digests)
    assert np.flatnonzero(image == NONE).tolist() == [5]
    assert scene.finder.old == 1


def test_pages_with_the_digest_of_a_block_and_another_content_are_no_match(scene: Scene) -> None:
    other = scene.one.copy()
    other[9 * PAGE_SIZE] ^= 1
    image, _ = scene.finder.find(other, page_digests(scene.one))
    assert np.flatnonzero(image == NONE).tolist() == [9]


def test_a_block_that_has_changed_is_not_given_out(scene: Scene) -> None:
    image, block = scene.finder.find(scene.one, page_digests(scene.one))
    found = disk.locators(image, block)
    scene.spoil(5)
    into = np.empty(scene.one.size, dtype=np.uint8)
    with pytest.raises(DamagedPageError, match=r"1 of 600 blocks .* block 5 of .*/one"):
        scene.store.fetch(found, page_digests(scene.one), into)
    assert np.flatnonzero(~scene.store.read(found, page_digests(scene.one), into)).tolist() == [5]


def test_locators_that_name_nothing_are_not_sound(scene: Scene) -> None:
    into = np.empty(3 * PAGE_SIZE, dtype=np.uint8)
    odd = disk.locators(np.array([7, 0, 0xFFFF], np.uint16), np.array([0, 1 << 40, (1 << 48) - 1], np.uint64))
    assert not scene.store.read(odd, np.zeros(3, np.uint64), into).any()
    with pytest.raises(DamagedPageError, match="image 7, which is not open"):
        scene.store.fetch(odd[:1], np.zeros(1, np.uint64), into)


def test_a_disk_that_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(PAGE_SIZE))
    (tmp_path / "odd").write_bytes(b"odd" * 500)
    disks = [
        Disk(path=str(tmp_path / "odd"), format="qcow2"),
        Disk(path=str(tmp_path / "raw")),
        Disk(path=str(tmp_path / "none")),
    ]
    with Images(disks) as images:
        assert [layer.disk for layer in images.layers] == [1]
        assert [left.reason for left in images.left] == ["image-damaged", "image-missing"]


def test_blocks_are_asked_for_ahead_those_side_by_side_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> int:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((fd, offset // PAGE_SIZE, length // PAGE_SIZE))
        return 0

    monkeypatch.setattr(native, "posix_fadvise", advise)
    image = np.array([0, 0, 0, 1, 0, 0, 0, 1, 9], dtype=np.uint16)
    block = np.array([7, 8, 9, 10, 5, 4, 3, 2, 1], dtype=np.uint64)
    # The compiled one cannot be watched.
    disk._ask_ahead.py_func(np.array([30, 31], dtype=np.int32), disk.locators(image, block))
    assert asked == [(30, 7, 3), (31, 10, 1), (30, 3, 3), (31, 2, 1)]


def test_what_is_asked_for_ahead_comes_into_the_page_cache(scene: Scene) -> None:
    content = np.concatenate([page_of(scene.one, number) for number in (300, 17)])
    file = scene.images.files[0].fileno()

    def cached(block: int) -> bool:
        try:
            return os.preadv(file, [bytearray(PAGE_SIZE)], block * PAGE_SIZE, os.RWF_NOWAIT) == PAGE_SIZE
        except BlockingIOError:
            return False

    os.fsync(file)
    # On tmpfs it stays.
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    scene.finder.ask_ahead(page_digests(content), np.array([False, False]))
    wait_for(lambda: cached(300) and cached(17), "reading ahead")
