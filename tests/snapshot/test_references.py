"""A snapshot refers to what the guest's disk holds, and is whole with the disk it was taken beside."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import RefusedError
from outboard.pages import PAGE_SIZE
from outboard.snapshot.live import save
from outboard.snapshot.writing import SnapshotWriter
from outboard.stores.snapshot import SnapshotStore
from outboard.stores.snapshot_format import Contents, Kind
from tests.pager.test_on_disk import HELD, PAGES, Scene, scene
from tests.support.snapshots import SEED, meta, name

__all__ = ["scene"]


def taken(scene: Scene, directory: Path) -> Contents:
    with (
        tempfile.TemporaryFile(dir=directory) as spill,
        SnapshotWriter(directory, name(0), PAGES, SEED) as writer,
    ):
        capture = scene.pager.capture(spill.fileno())
        try:
            capture.take()
            save(capture, writer, scene.on_disk)
        finally:
            scene.pager.end_capture(capture)
        return writer.finish(meta(0, PAGES), b"devices")


def test_what_a_disk_holds_is_not_written_and_reads_as_it_was(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    directory.mkdir(mode=0o700)
    # One of those that the disk holds is there no longer as it holds it.
    scene.target.ask(f"w {HELD.start + 3} 12345")
    contents = taken(scene, directory)
    referred = np.flatnonzero(contents.table.kinds == Kind.DISK)
    assert referred.tolist() == [page for page in HELD if page != HELD.start + 3]
    store = SnapshotStore(directory, name(0))
    try:
        numbers = np.array([*HELD], dtype=np.int64)
        content = np.empty(numbers.size * PAGE_SIZE, dtype=np.uint8)
        store.fetch(store.locators[numbers], content)
        expected = np.empty_like(content)
        scene.guest.memory.read_into(HELD.start, expected.data)
        assert np.array_equal(content, expected)
    finally:
        store.close()


def test_it_is_refused_when_the_disk_has_changed(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "snapshots"
    directory.mkdir(mode=0o700)
    taken(scene, directory)
    scene.spoil(HELD.start)
    with pytest.raises(RefusedError) as refused:
        SnapshotStore(directory, name(0))
    assert refused.value.reason == "image-changed"
