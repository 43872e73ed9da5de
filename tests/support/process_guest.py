"""A C target as a guest: one region, no vCPU, no monitor. What only needs memory is tested on it."""

from __future__ import annotations

from outboard.linux import proc
from outboard.vmm.guest import Guest, Region
from tests.support.target import Target


def guest_of(target: Target) -> Guest:
    """The target as a guest; close it when done."""
    mapping = next(one for one in proc.maps(target.pid) if one.start == target.start)
    region = Region(0, target.pages, 0, target.start, 0, target.page_size, "target", mapping)
    return Guest("target", target.pid, (region,))
