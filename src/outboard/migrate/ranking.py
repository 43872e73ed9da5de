"""In which order pages go: the outbox's ranks, from the guest's hints where there are any.

Ranks, lowest first: QUEUES and IN_FLIGHT are what the guest's devices are about to touch; STALE_NOW pages were sent
early, were written since, and are sent again in the pause; STALE_LATER the same, fetched after the resume; then the
classes of :class:`~outboard.vmm.enlighten.PageClass`, the kernel's before its users', the addresses ascending within
each; last what the guest has said nothing of. Free pages have no turn.

A hint decides order and what is skipped, nothing else. A page is skipped only if the guest held it free when asked and
nobody has written it since: the write trace is armed before the guest is asked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from outboard.migrate.outbox import Outbox
from outboard.migrate.turns import NEVER
from outboard.pages.labels import put
from outboard.pages.pageset import PageSet
from outboard.vmm.enlighten import PageClass

QUEUES = 0
IN_FLIGHT = 1
STALE_NOW = 2
STALE_LATER = 3
_FIRST_CLASS = 4
LAST = NEVER - 1

_ORDER = (
    PageClass.PAGE_TABLES,
    PageClass.KERNEL,
    PageClass.SLAB,
    None,
    PageClass.OTHER,
    PageClass.ACTIVE_FILE,
    PageClass.ACTIVE_ANON,
    PageClass.INACTIVE,
)
"""Pages without a flag are the kernel's own, its stacks and the rings of its devices among them: QEMU touches those
while it loads the devices, and each that is missing then lengthens the pause. But so are the free pages that a
processor keeps at hand, tens of megabytes. What tells them apart is that somebody writes: None stands for those."""

UNCLASSED = _FIRST_CLASS + len(_ORDER)
"""The rank of pages of which the guest has said nothing."""

_RANK_OF: NDArray[np.uint8] = np.full(256, UNCLASSED, dtype=np.uint8)
_RANK_OF[PageClass.FREE] = NEVER
for _index, _class in enumerate(_ORDER):
    if _class is not None:
        _RANK_OF[_class] = _FIRST_CLASS + _index

EARLY_UPTO = _FIRST_CLASS + _ORDER.index(None)
"""What enlightened post-copy sends before the switch-over: what any guest touches at once, whatever it does."""

QUIET_UPTO = int(_RANK_OF[PageClass.ACTIVE_FILE])
"""What it sends beside that while it waits for the guest's next words: it will hardly be written again."""

_NEVER_FILES = (PageClass.PAGE_TABLES, PageClass.KERNEL, PageClass.SLAB, None, PageClass.ACTIVE_ANON)
_IN_THE_PAUSE = (QUEUES, IN_FLIGHT, STALE_NOW)
NOT_SOUGHT = frozenset((*_IN_THE_PAUSE, *(_FIRST_CLASS + _ORDER.index(one) for one in _NEVER_FILES)))
"""The ranks of pages that are not looked for on disks: no file's; and those for which the guest stands still, which it
has written to as a rule."""


def rank_all(outbox: Outbox, populated: PageSet) -> None:
    """Give every page that has memory its turn, all the same one."""
    put(outbox.rank, populated, UNCLASSED)


def rank_classes(outbox: Outbox, first: int, classes: NDArray[np.uint8]) -> None:
    """Take the guest's word for the pages from ``first`` on, one class each; pages without memory stay without turn."""
    part = outbox.rank[first : first + classes.size]
    np.copyto(part, _RANK_OF[classes], where=part != NEVER)


def rank_written(outbox: Outbox, pages: PageSet) -> None:
    """Those of ``pages``, which were written lately, that carry no flag belong to what goes early."""
    put(outbox.rank, pages, EARLY_UPTO, over=int(_RANK_OF[PageClass.OTHER]))


def rank_touched(outbox: Outbox, pages: PageSet) -> None:
    """Where the guest says nothing: what it was seen to touch goes before what it was not."""
    put(outbox.rank, pages & outbox.live(), int(_RANK_OF[PageClass.ACTIVE_ANON]))


def rank_devices(outbox: Outbox, rings: PageSet, in_flight: PageSet) -> None:
    """What devices are about to touch goes before all else, their rings first.

    What has gone without having a turn, as the free part of a large page, has none now.
    """
    gone = outbox.already_sent() - outbox.live()
    put(outbox.rank, in_flight - gone, IN_FLIGHT)
    put(outbox.rank, rings - gone, QUEUES)


def split_stale(outbox: Outbox, stale: PageSet, most: int) -> tuple[PageSet, PageSet]:
    """Choose which of ``stale`` are sent again in the pause: the ``most`` pages of lowest rank; the rest come later."""
    numbers = stale.numbers()
    if numbers.size > most:
        numbers = numbers[np.argsort(outbox.rank[numbers], kind="stable")[:most]]
    now = PageSet.from_numbers(stale.pages, numbers)
    return now, stale - now


def revive(outbox: Outbox, pages: PageSet) -> None:
    """Give those of ``pages`` a turn that had none: somebody has written to them, so they are live after all."""
    put(outbox.rank, pages, UNCLASSED, over=NEVER)
