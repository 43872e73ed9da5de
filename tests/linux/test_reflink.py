"""Blocks that two files share, on XFS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import fiemap, reflink, xfs
from outboard.linux.fiemap import ExtentFlag
from tests.support.loops import mounted
from tests.support.requirements import require


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require("root", "loop-file-systems")
    with mounted("xfs-exchange", tmp_path_factory.mktemp("xfs")) as made:
        yield made


def make(path: Path, content: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, 65536)
    os.fsync(fd)
    return fd


def test_a_clone_shares_blocks(place: Path) -> None:
    one, other = make(place / "one", b"x" * 65536), make(place / "other", b"")
    reflink.clone(one, 4096, other, 8192, 16384)
    assert os.pread(other, 65536, 0) == bytes(8192) + b"x" * 16384 + bytes(40960)
    assert all(extent.flags & ExtentFlag.SHARED for extent in fiemap.extents(other, 8192, 16384))
    os.close(one)
    os.close(other)


def test_an_exchange_moves_blocks_into_a_hole(place: Path) -> None:
    one, other = make(place / "one", b"x" * 65536), make(place / "other", b"")
    xfs.exchange(one, 4096, other, 8192, 16384)
    assert os.pread(other, 65536, 0) == bytes(8192) + b"x" * 16384 + bytes(40960)
    assert os.pread(one, 65536, 0) == b"x" * 4096 + bytes(16384) + b"x" * 45056
    assert os.fstat(one).st_blocks * 512 == 65536 - 16384
    assert os.fstat(other).st_blocks * 512 == 16384
    os.close(one)
    os.close(other)


def test_a_refusal_names_the_request(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(KernelError, match="FICLONERANGE"):
        reflink.clone(-1, 0, fd, 0, 4096)
    with pytest.raises(KernelError, match="XFS_IOC_EXCHANGE_RANGE"):
        xfs.exchange(fd, 0, -1, 0, 4096)
    os.close(fd)
