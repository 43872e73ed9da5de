"""A VMM that hands its userfaultfd over as Cloud Hypervisor or Firecracker does: vmm_client.c, and what it says."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from outboard.linux.userfaultfd import Features, Mode
from tests.support.target import Target, compile_c

SHMEM = Features.MISSING_SHMEM | Features.WP_HUGETLBFS_SHMEM
"""What Cloud Hypervisor agrees on for shared memory."""


def framed(message: object) -> bytes:
    """A message in Cloud Hypervisor's framing."""
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack("<I", len(body)) + body


class VmmClient(Target):
    """A process with guest memory, ``regions`` of (address, bytes), mapped and registered but untouched."""

    def __init__(self, kind: str = "memfd", mebibytes: int = 4, threads: int = 3) -> None:
        super().__init__(kind, mebibytes, threads, compile_c("vmm_client.c"))
        self.regions = [(self.start, self.size)]

    def register(self, mode: Mode = Mode.MISSING, features: Features = SHMEM) -> None:
        """Make the userfaultfd."""
        assert self.ask(f"u {int(mode)} {int(features)}") == "0"

    def add_memory(self, mebibytes: int) -> None:
        """Map one more region, as memory that is plugged in."""
        failed, address = self.ask(f"m {mebibytes}").split()
        assert failed == "0"
        self.regions.append((int(address, 16), mebibytes << 20))

    def connect(self, path: Path) -> None:
        """Connect to whoever listens."""
        assert self.ask(f"c {path}") == "0"

    def send(self, data: bytes, descriptors: str = "-") -> None:
        """Send in one go; ``descriptors``: u for the userfaultfd, n for another, one letter each."""
        assert self.ask(f"s {descriptors} {data.hex()}") == str(len(data))

    def answer_within(self, milliseconds: int) -> str:
        """``answer N``, ``none`` or ``closed``."""
        return self.ask(f"a {milliseconds}")

    def region(self, index: int) -> dict[str, int]:
        """A region as Cloud Hypervisor tells of it: the second and later ones above 4 GiB."""
        address, size = self.regions[index]
        below = sum(size for _, size in self.regions[1:index])
        return {
            "guest_phys_addr": (4 << 30) + below if index else 0,
            "host_virt_addr": address,
            "size": size,
            "backing_file_offset": 0,
        }

    def handoff(self, mode: str = "MISSING", **changes: Any) -> dict[str, Any]:
        """Cloud Hypervisor's first message."""
        regions = [self.region(index) for index in range(len(self.regions))]
        return {
            "type": "handoff",
            "version": 0,
            "vmm_pid": self.pid,
            "mode": mode,
            "regions": regions,
        } | changes

    def added(self) -> dict[str, Any]:
        """Cloud Hypervisor's message after :meth:`add_memory`."""
        return {"type": "add_region", "region": self.region(len(self.regions) - 1)}

    def snapshot_regions(self, **changes: Any) -> list[dict[str, int]]:
        """Firecracker's message."""
        told, offset = [], 0
        for address, size in self.regions:
            sizes = {"page_size": 4096, "page_size_kib": 4096}
            told.append({"base_host_virt_addr": address, "size": size, "offset": offset} | sizes | changes)
            offset += size
        return told

    def hand_over(self, path: Path, **changes: Any) -> None:
        """Connect and hand over as Cloud Hypervisor does, up to where it waits for the answer."""
        self.connect(path)
        self.send(framed(self.handoff(**changes)), "u")

    def touch(self) -> str:
        """Read all pages; the sum of their first words."""
        assert self.ask("g") == "going"
        return self.ask("j")
