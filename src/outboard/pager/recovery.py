"""Recovery: the journal and the memory of a guest made to agree, whatever whoever managed it before has died over.

Why that can be done is told in :mod:`outboard.pages.residency`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import numpy as np

from outboard.errors import KernelError
from outboard.pager.keeper import BATCH, Keeper
from outboard.pages import PAGE_SIZE
from outboard.pages.content import zero_pages
from outboard.pages.residency import Where
from outboard.pages.shared import shared_array
from outboard.stores.file import FileStore
from outboard.stores.snapshot import SnapshotStore


def recover(keeper: Keeper, stores: Mapping[Where, FileStore | SnapshotStore]) -> None:
    """Make the journal agree with the guest's file, lift every protection, and have everybody ask again.

    :param stores: keep what the journal names, and nothing else.
    :raise KernelError: the kernel refused; EBUSY: somebody holds on to a large page of which parts were on their way to
        a store. It may be tried again.
    """
    where = keeper.residency.where
    whole = keeper.whole()
    # What is still protected nobody can write to before it is gone.
    _finish_leaving(keeper)
    keeper.protect(whole, False)
    keeper.follow_mappings()
    away = (where > Where.ZERO) & (where != Where.SHARED)
    if away.any():
        where[away & keeper.guest.memory.populated().mask()] = Where.RESIDENT
    for kind, store in stores.items():
        store.retain(keeper.residency.locator[where == kind])
    keeper.wake(whole)


def _finish_leaving(keeper: Keeper) -> None:
    """Punch what was being punched: parts of a large page that it could not split the kernel filled with zeros."""
    residency = keeper.residency
    leaving = np.flatnonzero(residency.leaving)
    # What had not gone yet is as it was; no page of zeros was under way to a store.
    gone = leaving[residency.where[leaving] != Where.RESIDENT]
    content = shared_array(min(gone.size, BATCH) * PAGE_SIZE, np.uint8)
    for batch in np.split(gone, range(BATCH, gone.size, BATCH)):
        read = content[: batch.size * PAGE_SIZE]
        keeper.read(keeper.runs_of(batch), read)
        zeros = batch[zero_pages(read)]
        if not keeper.punch(keeper.runs_of(zeros)):
            raise KernelError(
                f"fallocate(PUNCH_HOLE) of {zeros.size} pages of {keeper.guest.name} that are in a store, from page "
                f"{int(zeros[0]):#x} on, in a large page that somebody holds on to",
                errno.EBUSY,
            )
    residency.leaving[leaving] = 0
