"""Which ranges of a file have blocks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import fallocate, fiemap
from outboard.linux.fiemap import ExtentFlag


def test_holes_and_what_was_never_written_are_told_apart(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"x" * 65536, 0)
    os.fsync(fd)
    try:
        fallocate.allocate(fd, 1 << 19, 65536)
        found = fiemap.extents(fd, 0, 1 << 20)
    except KernelError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system does not tell")
        raise
    written = [one for one in found if not one.flags & ExtentFlag.UNWRITTEN]
    unwritten = [one for one in found if one.flags & ExtentFlag.UNWRITTEN]
    assert (written[0].offset, sum(one.length for one in written)) == (0, 65536)
    assert (unwritten[0].offset, sum(one.length for one in unwritten)) == (1 << 19, 65536)
    assert fiemap.extents(fd, 1 << 18, 4096) == []
    os.close(fd)


def test_more_extents_than_are_told_at_once(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for number in range(300):
        os.pwrite(fd, b"x" * 4096, number * 8192)
    os.fsync(fd)
    offsets = [one.offset for one in fiemap.extents(fd, 0, 300 * 8192)]
    assert offsets == [number * 8192 for number in range(300)]
    os.close(fd)


def test_a_refusal_names_the_request() -> None:
    with pytest.raises(KernelError, match="FS_IOC_FIEMAP"):
        fiemap.extents(-1, 0, 4096)
