"""Room in files."""

from __future__ import annotations

import errno
import os

import pytest

from outboard.errors import KernelError
from outboard.linux import fallocate, memfd


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_room_is_taken_and_given_back() -> None:
    fd = memfd.create("outboard-test", 1 << 20)
    assert blocks(fd) == 0
    fallocate.allocate(fd, 0, 1 << 20)
    assert blocks(fd) == 1 << 20
    os.pwrite(fd, b"x" * 8192, 4096)
    fallocate.punch(fd, 4096, 4096)
    assert blocks(fd) == (1 << 20) - 4096
    assert os.pread(fd, 12288, 0) == bytes(8192) + b"x" * 4096
    assert os.fstat(fd).st_size == 1 << 20
    os.close(fd)


def test_a_refusal_names_the_range() -> None:
    with pytest.raises(KernelError, match=r"PUNCH_HOLE.* of 4096 bytes at 8192") as caught:
        fallocate.punch(-1, 8192, 4096)
    assert caught.value.errno == errno.EBADF
