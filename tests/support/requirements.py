"""Named skips. ``OUTBOARD_REQUIRE=all`` turns every one of them into a failure."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from outboard.linux import cgroup, hugetlb, ksm, proc, psi, statfs
from outboard.linux.pagemap import has_pagemap_scan, has_soft_dirty
from outboard.linux.userfaultfd import DEVICE, Features, available_features


def _kernel(feature: Features) -> Callable[[], bool]:
    return lambda: feature in available_features()


def _keeps_blocks() -> bool:
    with tempfile.TemporaryFile() as file:
        return statfs.of(file.fileno()).type in (statfs.EXT4_SUPER_MAGIC, statfs.XFS_SUPER_MAGIC)


_CHECKS: dict[str, tuple[Callable[[], bool], str]] = {
    "block-file-system": (_keeps_blocks, "temporary files are not on ext4 or XFS"),
    "pagemap-scan": (has_pagemap_scan, "the kernel has no PAGEMAP_SCAN (Linux 6.7)"),
    "cgroup-cpu": (lambda: cgroup.cpu_version() is not None, "no cgroup hierarchy with the cpu controller is mounted"),
    "hugetlb-2mib": (lambda: any(p.page_size == 2 << 20 and p.free for p in hugetlb.pools()), "no free 2 MiB pages"),
    "ksm": (ksm.present, "the kernel has no KSM"),
    "loop-file-systems": (
        lambda: all(map(shutil.which, ("mkfs.ext4", "mkfs.xfs"))) and Path("/dev/loop-control").exists(),
        "mkfs.ext4, mkfs.xfs or loop devices are missing",
    ),
    "move": (_kernel(Features.MOVE), "the kernel has no UFFDIO_MOVE (Linux 6.8)"),
    "no-swap": (lambda: proc.meminfo()["SwapTotal"] == 0, "swap is configured, and pages would be written there"),
    "poison": (_kernel(Features.POISON), "the kernel has no UFFDIO_POISON (Linux 6.6)"),
    "psi": (lambda: psi.why_not() is None, "the kernel tells of no pressure"),
    "qemu": (lambda: shutil.which("qemu-system-x86_64") is not None, "qemu-system-x86_64 is not installed"),
    "root": (lambda: os.geteuid() == 0, "needs root"),
    "rwp": (_kernel(Features.RWP), "the kernel has no UFFD_FEATURE_RWP"),
    "soft-dirty": (has_soft_dirty, "the kernel has no soft-dirty pages (CONFIG_MEM_SOFT_DIRTY)"),
    "systemd": (lambda: shutil.which("systemd-analyze") is not None, "systemd-analyze is not installed"),
    "userfaultfd-device": (Path(DEVICE).exists, f"the kernel has no {DEVICE} (Linux 6.1)"),
    "wp-async": (_kernel(Features.WP_ASYNC), "the kernel has no UFFD_FEATURE_WP_ASYNC (Linux 6.7)"),
}


def require(*names: str) -> None:
    """Skip the running test by name when the machine lacks one of ``names``."""
    for name in names:
        present, reason = _CHECKS[name]
        if not present():
            words = f"{name}: {reason}"
            if os.environ.get("OUTBOARD_REQUIRE") == "all":
                pytest.fail(words)
            pytest.skip(words)
