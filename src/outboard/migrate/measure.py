"""Watching a guest for a plan: what its pages hold, what it says of them, and how fast it writes.

Nothing of it outlasts the watching: the write trace is taken off again, and the guest's pages are only read.
"""

from __future__ import annotations

import time
import zlib

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError, UnreachableError
from outboard.migrate import ranking
from outboard.migrate.outbox import Outbox
from outboard.migrate.plan import Range, Watched
from outboard.migrate.turns import NEVER
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests, zero_pages
from outboard.pages.pageset import PageSet
from outboard.stores import disk
from outboard.stores.disk import Finder
from outboard.trace.writes import open_write_trace
from outboard.vmm.enlighten import chunks
from outboard.vmm.guest import QemuGuest
from outboard.vmm.guest_agent import GuestAgent

_HINTS_S = 5.0
_FIRST_LOOK_S, _NEXT_LOOK = 0.05, 1.5
_LOOKED_AT = 1 << 15
"""Pages whose content is looked at; all of them in a guest of 128 MiB or less."""
_COMPRESSED = 256
"""Pages that are compressed on trial."""
_BATCH = 256
_DOUBT = 3.0
"""Standard deviations of a sampled share that its range spans to either side."""


def watch(guest: QemuGuest, seconds: float, random: np.random.Generator, finder: Finder | None = None) -> Watched:
    """Watch ``guest`` for about ``seconds``.

    :param random: chooses the pages to look at. :param finder: finds them on disks.
    :raise RefusedError: no write trace can be armed. :raise KernelError: the guest has ended.
    """
    outbox = Outbox(guest.pages)
    with open_write_trace(guest) as trace:
        populated = guest.memory.populated()
        ranking.rank_all(outbox, populated)
        hints, hints_s = _ask(guest, outbox)
        # What has no flag and was written meanwhile goes early.
        ranking.rank_written(outbox, trace.collect())
        growth = []
        began = time.monotonic()
        due = _FIRST_LOOK_S
        while (now := time.monotonic() - began) < seconds:
            time.sleep(max(0.0, min(due, seconds) - now))
            written = len(trace.peek())
            growth.append((time.monotonic() - began, written))
            due *= _NEXT_LOOK
        backend = trace.backend
    data, zero, free_data, on_disk, compressed = _content(guest, populated, outbox.rank == NEVER, random, finder)
    return Watched(
        pages=guest.pages,
        populated=len(populated),
        data=data,
        zero=zero,
        free_data=free_data,
        early=int(np.count_nonzero(outbox.rank <= ranking.EARLY_UPTO)),
        compressed=compressed,
        growth=growth,
        seconds=seconds,
        trace=backend,
        hints=hints,
        hints_s=hints_s,
        on_disk=None if finder is None else on_disk,
    )


def _ask(guest: QemuGuest, outbox: Outbox) -> tuple[str, float]:
    """Rank what the guest tells; in words what that was, and how long it took."""
    if guest.agent_path is None:
        return "none: the VM has no guest agent", 0.0
    began, told = time.monotonic(), 0
    try:
        with GuestAgent(guest.agent_path, timeout=_HINTS_S) as agent:
            for first, classes in chunks(guest, agent, deadline=began + _HINTS_S):
                ranking.rank_classes(outbox, first, classes)
                told += classes.size
    except (PeerError, UnreachableError, OSError) as error:
        words = f"{told} pages classed, then none: {error}" if told else f"none: {error}"
    else:
        words = f"guest agent: {told} pages classed"
    return words, time.monotonic() - began


def _content(
    guest: QemuGuest,
    populated: PageSet,
    free: NDArray[np.bool_],
    random: np.random.Generator,
    finder: Finder | None,
) -> tuple[Range, Range, Range, Range, float | None]:
    """Populated pages: with content, zeros, with content and free, on disks; and how small content becomes."""
    numbers = populated.numbers()
    chosen = numbers
    if numbers.size > _LOOKED_AT:
        chosen = np.sort(random.choice(numbers, _LOOKED_AT, replace=False))
    zero: NDArray[np.bool_] = np.zeros(chosen.size, dtype=np.bool_)
    held: NDArray[np.bool_] = np.zeros(chosen.size, dtype=np.bool_)
    trial: list[bytes] = []
    every = max(1, chosen.size // _COMPRESSED)
    buffer: NDArray[np.uint8] = np.empty(_BATCH * PAGE_SIZE, dtype=np.uint8)
    for begin in range(0, chosen.size, _BATCH):
        part = chosen[begin : begin + _BATCH]
        for index, page in enumerate(part.tolist()):
            guest.memory.read_into(page, buffer[index * PAGE_SIZE : (index + 1) * PAGE_SIZE].data)
        content = buffer[: part.size * PAGE_SIZE]
        zero[begin : begin + part.size] = zero_pages(content)
        if finder is not None:
            image, _ = finder.find(content, page_digests(content), zero[begin : begin + part.size])
            held[begin : begin + part.size] = image != disk.NONE
        for index in range(-begin % every, part.size, every):
            if not zero[begin + index]:
                trial.append(content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE].tobytes())
    compressed = None
    if trial:
        compressed = sum(min(PAGE_SIZE, len(zlib.compress(page, 1))) for page in trial) / len(trial) / PAGE_SIZE
    held_free = free[chosen]
    return (
        share_of(int((~zero).sum()), chosen.size, numbers.size),
        share_of(int(zero.sum()), chosen.size, numbers.size),
        share_of(int((held_free & ~zero).sum()), chosen.size, numbers.size),
        share_of(int(held.sum()), chosen.size, numbers.size),
        compressed,
    )


def share_of(found: int, looked_at: int, among: int) -> Range:
    """How many of ``among`` are such as ``found`` of ``looked_at`` were."""
    if looked_at >= among:
        return Range(found, found)
    share = found / looked_at
    # Of a rare kind none may have been met: count as if one had been, and one had not.
    likely = (found + 1) / (looked_at + 2)
    doubt = _DOUBT * (likely * (1 - likely) / looked_at) ** 0.5
    return Range(max(0.0, share - doubt) * among, min(1.0, share + doubt) * among)
