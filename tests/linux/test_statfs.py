"""Which file system a file is on."""

from __future__ import annotations

import os

import pytest

from outboard.errors import KernelError
from outboard.linux import memfd, statfs


def test_a_memfd_is_on_tmpfs_and_proc_is_not() -> None:
    fd = memfd.create("probe", 4096)
    try:
        assert statfs.of(fd) == statfs.FileSystem(statfs.TMPFS_MAGIC, 4096)
    finally:
        os.close(fd)
    with open("/proc/self/stat") as file:
        assert statfs.of(file.fileno()).type != statfs.TMPFS_MAGIC


def test_no_descriptor_is_an_error() -> None:
    with pytest.raises(KernelError, match="fstatfs of descriptor -1: Bad file descriptor"):
        statfs.of(-1)
