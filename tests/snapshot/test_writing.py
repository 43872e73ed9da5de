"""Writers of snapshots: a file is there whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import DamagedPageError, NotFoundError, RefusedError, StoreFullError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.snapshot import catalog
from outboard.snapshot.writing import SnapshotWriter, remove_partial
from outboard.stores.snapshot_format import Kind
from tests.stores.test_snapshot import read_back
from tests.support.snapshots import SEED, memory_of, meta, name, write

MEMORY = memory_of(64, np.random.default_rng(2))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with SnapshotWriter(tmp_path, name(0), 64, SEED) as writer:
        assert names(tmp_path) == [f"{name(0)}.snap.partial"]
        with pytest.raises(ValueError, match="64 pages of web were never added"):
            writer.finish(meta(0, 64), b"")
    assert names(tmp_path) == []


def test_what_a_writer_that_was_killed_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        SnapshotWriter(tmp_path, name(1), 64, SEED)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == [f"{name(1)}.snap.partial"]
    with SnapshotWriter(tmp_path, name(0), 64, SEED):
        assert names(tmp_path) == [f"{name(0)}.snap.partial"]
        remove_partial(tmp_path)
        assert names(tmp_path) == [f"{name(0)}.snap.partial"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        return real(fd, data[: max(0, 20_000 - at)], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFullError, match=r"full after \d+ bytes"):
        write(tmp_path, 0, MEMORY)
    assert names(tmp_path) == []


def test_a_name_is_given_once(tmp_path: Path) -> None:
    write(tmp_path, 0, MEMORY)
    with pytest.raises(RefusedError, match="already"):
        write(tmp_path, 0, MEMORY)
    assert names(tmp_path) == [f"{name(0)}.snap"]


def test_the_catalogue(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no snapshot of web"):
        catalog.latest(tmp_path, "web")
    first = write(tmp_path, 0, MEMORY)
    write(tmp_path, 1, MEMORY, first)
    (tmp_path / f"{name(2)}.snap").write_bytes(b"nonsense")
    listed = {one.id: one for one in catalog.listed(tmp_path)}
    assert listed[name(1)].parent == name(0)
    assert listed[name(0)].new == int(first.chunks.pages.sum()) * PAGE_SIZE
    assert "not what was written" in str(listed[name(2)].damage)
    assert catalog.latest(tmp_path, "web").meta.id == name(1)
    assert catalog.verify(tmp_path, name(1)).files == 2
    with pytest.raises(RefusedError, match=f"{name(1)} goes on from"):
        catalog.remove(tmp_path, name(0), ())
    with pytest.raises(RefusedError, match="vm7 still has pages"):
        catalog.remove(tmp_path, name(1), [(name(1), "vm7")])
    catalog.remove(tmp_path, name(1), [(name(0), "vm7")])
    with pytest.raises(NotFoundError):
        catalog.remove(tmp_path, name(1), ())


def test_verification_finds_a_byte_that_nothing_reads(tmp_path: Path) -> None:
    write(tmp_path, 0, MEMORY)
    path = tmp_path / f"{name(0)}.snap"
    whole = bytearray(path.read_bytes())
    for at in range(48, len(whole), 997):
        whole[at] ^= 4
        path.write_bytes(whole)
        with pytest.raises(RefusedError, match=r"byte \d+ on") as caught:
            catalog.verify(tmp_path, name(0))
        assert caught.value.reason == "damaged-snapshot"
        whole[at] ^= 4
    path.write_bytes(whole)
    catalog.verify(tmp_path, name(0))


def test_an_order_is_a_hint(tmp_path: Path) -> None:
    rows = np.array([5, 1, 9], dtype=np.int64)
    assert catalog.kept_order(tmp_path, name(0), 10) is None
    catalog.keep_order(tmp_path, name(0), rows)
    kept = catalog.kept_order(tmp_path, name(0), 10)
    assert kept is not None
    assert kept.tolist() == [5, 1, 9]
    assert catalog.kept_order(tmp_path, name(0), 9) is None
    path = tmp_path / f"{name(0)}.order"
    path.write_bytes(path.read_bytes()[:-1])
    assert catalog.kept_order(tmp_path, name(0), 10) is None


def test_blocks_of_an_image_are_read_from_there(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    chance = np.random.default_rng(8)
    blocks = chance.integers(0, 256, (6, PAGE_SIZE), dtype=np.uint8)
    image.write_bytes(b"x" * 1000 + blocks.tobytes())
    memory = MEMORY.copy().reshape(-1, PAGE_SIZE)
    numbers = np.array([3, 9, 10, 40], dtype=np.int64)
    offsets = 1000 + np.array([5, 0, 1, 0]) * PAGE_SIZE
    memory[numbers] = blocks[[5, 0, 1, 0]]
    others = np.setdiff1d(np.arange(64), numbers)
    with SnapshotWriter(tmp_path, name(0), 64, SEED) as writer:
        for index in (slice(0, 1), slice(1, 4)):
            content = memory[numbers[index]].reshape(-1)
            writer.refer(numbers[index], content, image, offsets[index])
        content = memory[others].reshape(-1)
        writer.add(others, content, zero_pages(content))
        first = writer.finish(meta(0, 64), b"")
    assert np.count_nonzero(first.table.kinds == Kind.DISK) == 4
    assert np.array_equal(read_back(tmp_path, 0), memory.reshape(-1))
    memory[0] = 1
    write(tmp_path, 1, memory.reshape(-1), first)
    assert np.array_equal(read_back(tmp_path, 1), memory.reshape(-1))
    # The same size and time, another content: it is not what the digest says.
    before = image.stat()
    image.write_bytes(b"x" * 1000 + blocks[::-1].tobytes())
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedPageError, match=r"disk\.raw does not hold what was written"):
        read_back(tmp_path, 1)
    os.utime(image)
    with pytest.raises(RefusedError, match="was written since") as caught:
        read_back(tmp_path, 1)
    assert caught.value.reason == "image-changed"
    image.unlink()
    with pytest.raises(NotFoundError):
        read_back(tmp_path, 0)
