"""Pools of huge pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from outboard.linux import hugetlb


def test_pools_are_those_of_sysfs() -> None:
    pools = hugetlb.pools()
    assert [pool.page_size for pool in pools] == sorted(
        int(path.name.split("-")[1].removesuffix("kB")) * 1024 for path in hugetlb.POOLS.iterdir()
    )
    for pool in pools:
        assert 0 <= pool.reserved <= pool.total
        assert 0 <= pool.free <= pool.total


def test_a_mount_is_found_by_its_page_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "tmpfs /dev/shm tmpfs rw 0 0\n"
        "hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=2M 0 0\n"
        "none /mnt/big\\040pages hugetlbfs rw,pagesize=1024M 0 0\n"
    )
    monkeypatch.setattr(hugetlb, "MOUNTS", mounts)
    assert hugetlb.mount_point(2 << 20) == Path("/dev/hugepages")
    assert hugetlb.mount_point(1 << 30) == Path("/mnt/big pages")
    assert hugetlb.mount_point(1 << 16) is None
