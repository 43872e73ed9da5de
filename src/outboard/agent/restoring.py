"""A restored VM: its pages are in a snapshot until it touches them, or until they are brought in ahead of that.

In the VM's directory ``snapshot.json`` names the snapshot while there are pages in it, and ``restoring`` is there until
the VM runs: an engine that dies before leaves nothing that anybody could go on with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, RefusedError
from outboard.pager.pager import Pager
from outboard.pages.pageset import PageSet
from outboard.pages.residency import Residency, Where
from outboard.snapshot import catalog
from outboard.stores.snapshot import SnapshotStore
from outboard.stores.snapshot_format import Contents
from outboard.vmm.guest import Guest

_SOURCE, _MARK = "snapshot.json", "restoring"
_ROWS = 16
"""Rows that are brought in between two looks at what else is to be done."""
log = structlog.get_logger()


class Source(msgspec.Struct, frozen=True):
    """The snapshot that a VM was restored from."""

    directory: str
    snapshot: str


def source_of(directory: Path) -> Source | None:
    """Which snapshot the VM whose directory this is still has pages in."""
    try:
        return msgspec.json.decode((directory / _SOURCE).read_bytes(), type=Source)
    except FileNotFoundError:
        return None


def begin(directory: Path, contents: Contents) -> None:
    """Note, before anything else, that a VM is being restored here, from a snapshot of these contents."""
    source = Source(os.fspath(contents.path.parent), contents.meta.id)
    (directory / _MARK).touch()
    (directory / _SOURCE).write_bytes(msgspec.json.encode(source))


def is_broken(directory: Path) -> bool:
    """Whether a restoration was begun here that did not come to its end."""
    return (directory / _MARK).exists()


class Restored:
    """Brings in the pages of a VM that were left in a snapshot, ``store``; made before its pager.

    Synchronization: one thread.
    """

    def __init__(self, directory: Path, source: Source, store: SnapshotStore) -> None:
        self.source, self.store = source, store
        self._directory = directory
        self._pager: Pager | None = None
        self._ahead: Iterator[NDArray[np.int64]] = iter(())
        self.done = False

    def absent(self, guest: Guest, residency: Residency) -> None:
        """Make everything absent, in a guest that has never run.

        :raise RefusedError: ``memory-layout``: QEMU lays out memory otherwise than when the snapshot was taken.
        """
        ours = [(region.first, region.pages, region.gpa) for region in guest.regions]
        if ours != self.store.chain[0].meta.layout:
            raise RefusedError(
                "memory-layout",
                f"{guest.name}: QEMU lays out memory as {ours}, and {self.source.snapshot} has "
                f"{self.store.chain[0].meta.layout}; use the QEMU that it was taken with",
            )
        # QEMU's own reset has written to it.
        for region in guest.regions:
            guest.memory.punch(region.first, region.pages)
        residency.locator[:] = self.store.locators
        residency.where[:] = self.store.where

    def attend(self, pager: Pager) -> None:
        """The pager is there: bring pages in from now on, by :meth:`step`."""
        self._pager = pager
        self._ahead = self._order()

    def _order(self) -> Iterator[NDArray[np.int64]]:
        """Rows, a few at a time: in the order in which an earlier VM wanted them, then as they lie in the files."""
        count = self.store.rows.offsets.size
        kept = catalog.kept_order(Path(self.source.directory), self.source.snapshot, count)
        first = self.store.chain[0].table.hot.astype(np.int64) if kept is None else kept
        order = np.concatenate((first, np.setdiff1d(np.arange(count), first)))
        yield from np.array_split(order, range(_ROWS, order.size, _ROWS))

    def step(self) -> bool:
        """Bring a few pages in; False: there are none left."""
        pager = self._pager
        if pager is None or self.done:
            return False
        rows = next(self._ahead, None)
        if rows is None:
            self._rest(pager)
            return not self.done
        members = self.store.rows.members[rows].reshape(-1)
        self._fetch(pager, PageSet.from_numbers(pager.guest.pages, members[members >= 0]))
        return True

    def _fetch(self, pager: Pager, pages: PageSet) -> None:
        try:
            pager.fetch(pages & pager.residency.pages_at(Where.SNAPSHOT))
        except DamagedPageError as error:
            # Whoever touches it will be told; all others come.
            log.error("restoring", vm=pager.guest.name, why=str(error))

    def _rest(self, pager: Pager) -> None:
        """Pages with the content of others, and those that a fault was busy with; then there is nothing left to do."""
        left = pager.residency.pages_at(Where.SNAPSHOT)
        if left:
            self._fetch(pager, left)
        self.done = True
        if not pager.residency.count(Where.SNAPSHOT):
            directory, name = Path(self.source.directory), self.source.snapshot
            if catalog.kept_order(directory, name, self.store.rows.offsets.size) is None:
                catalog.keep_order(directory, name, pager.wanted_rows())
            (self._directory / _SOURCE).unlink(missing_ok=True)
            log.info("restored", vm=pager.guest.name, snapshot=name)

    def runs(self) -> None:
        """The VM runs: from now on a successor goes on."""
        (self._directory / _MARK).unlink(missing_ok=True)
