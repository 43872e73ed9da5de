"""A guest as it was attached, kept in a file for an engine that comes after us.

A guest that waits for a page may answer no QMP, so nobody can attach to it anew; what it looks like does not change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

import msgspec

from outboard.errors import KernelError
from outboard.linux import proc
from outboard.vmm.guest import Guest, Region, VCpu


class Layout(msgspec.Struct, frozen=True):
    """With ``start_time``, in clock ticks since boot, the pid is a process for good."""

    name: str
    pid: int
    start_time: int
    regions: tuple[Region, ...]
    vcpus: tuple[VCpu, ...]

    @classmethod
    def keep(cls, guest: Guest, path: Path) -> Self:
        """The layout of ``guest``, written to ``path``.

        :raise KernelError: it has ended.
        """
        layout = cls(guest.name, guest.pid, proc.start_time(guest.pid), guest.regions, guest.vcpus)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_bytes(msgspec.json.encode(layout))
        fresh.rename(path)
        return layout

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What :meth:`keep` has written, if that guest still runs."""
        try:
            layout = msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        return layout if layout.alive else None

    @property
    def alive(self) -> bool:
        """Whether that guest still runs."""
        try:
            return proc.start_time(self.pid) == self.start_time
        except KernelError:
            return False

    def guest(self) -> Guest:
        """The guest: its memory and threads, without a monitor.

        :raise KernelError: it has ended.
        """
        maps = proc.maps(self.pid)
        return Guest(self.name, self.pid, tuple(_as_mapped(region, maps) for region in self.regions), self.vcpus)


def _as_mapped(region: Region, maps: list[proc.Mapping]) -> Region:
    """A region whose mapping has been cut since, by pages that are mapped from elsewhere: its first page never is."""
    for one in maps:
        kept = region.mapping
        if one.start <= region.hva < one.end and (one.device, one.inode) == (kept.device, kept.inode):
            return replace(region, mapping=one)
    return region
