"""hugetlbfs, /sys/kernel/mm/hugepages: the pools of huge pages and where files are made of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

POOLS = Path("/sys/kernel/mm/hugepages")
MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True, slots=True)
class Pool:
    """One page size's pool; sizes in bytes, counts in pages."""

    page_size: int
    total: int
    free: int
    reserved: int


def pools() -> list[Pool]:
    """The pools of this machine, smallest page first."""
    found = []
    for directory in POOLS.glob("hugepages-*kB"):
        read = {
            name: int((directory / name).read_text()) for name in ("nr_hugepages", "free_hugepages", "resv_hugepages")
        }
        size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        found.append(Pool(size, read["nr_hugepages"], read["free_hugepages"], read["resv_hugepages"]))
    return sorted(found, key=lambda pool: pool.page_size)


def mount_point(page_size: int) -> Path | None:
    """Where a hugetlbfs of that page size is mounted, if anywhere."""
    suffix = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for line in MOUNTS.read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        match = re.search(r"pagesize=(\d+)([KMG])", options)
        if kind == "hugetlbfs" and match and int(match[1]) * suffix[match[2]] == page_size:
            # getmntent(3): blanks are written in octal.
            return Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), target))
    return None
