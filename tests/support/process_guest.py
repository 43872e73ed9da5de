"""A C target as a guest: one region, no vCPU, no monitor. What only needs memory is tested on it."""

from __future__ import annotations

from typing import cast

from outboard.linux import proc
from outboard.vmm.guest import Guest, GuestMemory, Region
from tests.support.target import Target


class _ProcessGuest:
    def __init__(self, target: Target) -> None:
        self.name = "target"
        self.pid = target.pid
        mapping = next(one for one in proc.maps(target.pid) if one.start == target.start)
        self.regions = (Region(0, target.pages, 0, target.start, 0, 4096, "target", mapping),)
        self.vcpus = ()
        self.pages = target.pages
        self.memory = GuestMemory(target.pid, self.regions)

    def emulator_thread(self) -> int:
        return self.pid


def guest_of(target: Target) -> Guest:
    """The target as a guest; close its ``memory`` when done."""
    return cast(Guest, _ProcessGuest(target))
