"""Files in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import memfd
from tests.support.requirements import require


def test_a_file_has_its_size_and_is_not_inherited() -> None:
    fd = memfd.create("outboard-test", 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    assert "memfd:outboard-test" in str(Path(f"/proc/self/fd/{fd}").readlink())
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_size_that_huge_pages_do_not_divide_is_refused() -> None:
    with pytest.raises(KernelError, match="memfd_create of outboard-test, 4097 bytes") as caught:
        memfd.create("outboard-test", 4097, memfd.HugePages.MIB_2)
    assert caught.value.errno in (errno.EINVAL, errno.ENODEV)


def test_huge_pages() -> None:
    require("hugetlb-2mib")
    fd = memfd.create("outboard-test", 4 << 20, memfd.HugePages.MIB_2)
    assert os.fstat(fd).st_blksize == 2 << 20
    os.close(fd)
