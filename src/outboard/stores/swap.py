"""Pages in a thin swap file whose blocks come out of a :class:`~outboard.stores.reservation.Reservation`.

Slots are handed out as in :class:`~outboard.stores.file.FileStore`, but only where the swap file has blocks, or units
of the reservation that are lent to it. Units that are free for the most part are filled first, then others are taken;
what is scattered is filled up last, when the swap file is as long as the VM may be reclaimed. A unit that has become
empty goes back. Pages go past the page cache: what is swapped out of a VM is not to be kept in the host's memory.

Beside the swap file, in a directory of the caller's on tmpfs: ``slots`` (which are taken), ``digests`` of what they
hold, and ``units``, which says of each unit of the file that it has none (0), has its own blocks (1), or is lent unit
*k* of the reservation (k + 2).

Source: open(2), O_DIRECT.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, StoreFullError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.pages.shared import file_array, shared_array
from outboard.stores.file import FileStore
from outboard.stores.moving import UNIT, UNIT_PAGES
from outboard.stores.reservation import Reservation, SwapFile
from outboard.stores.store import StoreStatistics

_ROOMY = UNIT_PAGES // 4
"""Free slots of a unit that is worth writing to before another is taken."""
_KEPT = 2
"""Empty units that do not go back, for the next pages."""
_LENT = 2


class SwapStore(FileStore):
    """``room`` pages at most, in the swap file ``name`` of ``reservation``; a :class:`~outboard.stores.store.Store`.

    :param beside: the directory of what goes with it, by the name of the store in front.
    :raise StoreFullError: the disk has no room even for the file's name.
    :raise KernelError: it cannot be opened.

    It is closed with the reservation that it was given.

    Synchronization: any thread.
    """

    def __init__(self, reservation: Reservation, name: str, room: int, beside: Path) -> None:
        self.name = name
        self.room = room
        self._reservation = reservation
        units = -(-room // UNIT_PAGES)
        self._file: SwapFile | None = reservation.open(name, units)
        try:
            self.taken: NDArray[np.uint8] = file_array(beside / "swap.slots", units * UNIT_PAGES, np.uint8)
            self.digests: NDArray[np.uint64] | None = file_array(beside / "swap.digests", units * UNIT_PAGES, np.uint64)
            self.lent: NDArray[np.int64] = file_array(beside / "swap.units", units, np.int64)
        except BaseException:
            os.close(self._file.fd)
            raise
        # What the file system says is the truth, and of what is lent what both say.
        ours = np.zeros(units, dtype=np.int64)
        ours[reservation.held(self._file, units)] = 1
        lent = reservation.lent_to(self._file)
        for unit in np.flatnonzero(self.lent >= _LENT).tolist():
            k = int(self.lent[unit]) - _LENT
            if k in lent and not ours[unit]:
                ours[unit] = k + _LENT
                lent.remove(k)
        self.lent[:] = ours
        reservation.return_lent(self._file, list(lent))
        self._hand = 0
        # More are never taken: what goes is not counted until it matters.
        self._most = self._used()
        self._allocating = threading.Lock()
        self._local = threading.local()
        self._put = self._fetched = 0

    @property
    def _staging(self) -> NDArray[np.uint8]:
        """A unit on whole pages, for what is not; the thread's own."""
        if not hasattr(self._local, "staging"):
            self._local.staging = shared_array(UNIT, np.uint8)
        staging: NDArray[np.uint8] = self._local.staging
        return staging

    def _opened(self) -> SwapFile:
        if self._file is None:
            raise KernelError(f"use of the swap file {self.name} after it was closed", errno.EBADF)
        return self._file

    def _digests(self) -> NDArray[np.uint64]:
        assert self.digests is not None
        return self.digests

    def fileno(self) -> int:
        """The swap file: slot *n* is its page *n*, unless its unit is lent."""
        return self._opened().fd

    def lender(self) -> int:
        """The reservation, whose unit ``lent[n] - 2`` stands for unit *n* of the swap file unless that is below 0."""
        return self._reservation.fileno()

    def put(self, content: NDArray[np.uint8], digests: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
        """See :meth:`Store.put`.

        :raise StoreFullError: ``room`` pages are there.
        :raise KernelError: the disk failed.
        """
        file = self._opened()
        signed = page_digests(content) if digests is None else digests
        count = content.size // PAGE_SIZE
        rooms: list[tuple[NDArray[np.uint64], bool]] = []
        done = 0
        try:
            with self._allocating:
                self._most += count
                if self._most > self.room:
                    self._most = self._used() + count
                if self._most > self.room:
                    raise StoreFullError(
                        f"{self._used()} of the {self.room} pages that may be swapped out of {self.name} are; {count} "
                        "more were to be"
                    )
                rooms.extend(self._rooms(file, content))
            for slots, is_written in rooms:
                part = content[done * PAGE_SIZE :][: slots.size * PAGE_SIZE]
                self._digests()[slots] = signed[done : done + slots.size]
                if not is_written:
                    self._write(file, slots, part)
                done += slots.size
        except BaseException:
            for slots, _ in rooms:
                self.taken[slots] = 0
            raise
        self._put += count
        return np.concatenate([slots for slots, _ in rooms]) if rooms else np.empty(0, dtype=np.uint64)

    def _used(self) -> int:
        return int(np.count_nonzero(self.taken))

    def _rooms(self, file: SwapFile, content: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint64], bool]]:
        """Take slots for each page of ``content``; whether they have been written to as well."""
        missing = content.size // PAGE_SIZE
        for slots in self._free_slots(missing, _ROOMY):
            missing -= slots.size
            yield slots, False
        for unit in np.flatnonzero(self.lent == 0).tolist():
            if not missing:
                return
            part = content[content.size - missing * PAGE_SIZE :][:UNIT]
            lent, is_written = self._reservation.take(file, unit, part)
            self.lent[unit] = 1 if lent is None else lent + _LENT
            slots = np.arange(part.size // PAGE_SIZE, dtype=np.uint64) + np.uint64(unit * UNIT_PAGES)
            self.taken[slots] = 1
            missing -= slots.size
            yield slots, is_written
        for slots in self._free_slots(missing, 1):
            yield slots, False

    def _free_slots(self, wanted: int, least: int) -> Iterator[NDArray[np.uint64]]:
        """Take slots of units that have ``least`` free ones, unit by unit; at most ``wanted``."""
        if not wanted:
            return
        rows = self.taken.reshape(-1, UNIT_PAGES)
        unit, seen = self._hand, 0
        while wanted:
            unit, seen = _next_unit(rows, self.lent, unit, seen, least)
            if unit < 0:
                return
            slots = np.flatnonzero(rows[unit] == 0)[:wanted]
            rows[unit, slots] = 1
            wanted -= slots.size
            self._hand = unit
            yield (slots + unit * UNIT_PAGES).astype(np.uint64)
            unit, seen = (unit + 1) % self.lent.size, seen + 1

    def _runs(self, file: SwapFile, slots: NDArray[np.uint64]) -> Iterator[tuple[int, int, int, int]]:
        """Slots that lie one behind the other: which file, the offset, the index of the first, and behind the last."""
        if not slots.size:
            return
        unit = (slots // UNIT_PAGES).astype(np.int64)
        lent = self.lent[unit]
        is_lent = lent >= _LENT
        page = np.where(is_lent, (lent - _LENT) * UNIT_PAGES, unit * UNIT_PAGES) + (slots % UNIT_PAGES).astype(np.int64)
        edges = np.flatnonzero((np.diff(page) != 1) | (is_lent[1:] != is_lent[:-1])) + 1
        begins = [0, *edges.tolist()]
        for begin, end in zip(begins, [*begins[1:], slots.size], strict=True):
            # What goes through the staging area must fit into it.
            for first in range(begin, end, UNIT_PAGES):
                fd = self._reservation.fileno() if is_lent[first] else file.fd
                yield fd, int(page[first]) * PAGE_SIZE, first, min(end, first + UNIT_PAGES)

    def _write(self, file: SwapFile, slots: NDArray[np.uint64], content: NDArray[np.uint8]) -> None:
        for fd, offset, begin, end in self._runs(file, slots):
            part = content[begin * PAGE_SIZE : end * PAGE_SIZE]
            if part.ctypes.data % PAGE_SIZE:
                self._staging[: part.size] = part
                part = self._staging[: part.size]
            try:
                done = os.pwrite(fd, part.data, offset)
            except OSError as error:
                raise KernelError(
                    f"write of {part.size} bytes to swap file {self.name}", error.errno or errno.EIO
                ) from error
            if done != part.size:
                raise KernelError(f"write of {part.size} bytes to swap file {self.name}", errno.EIO)

    def fetch(self, locators: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        """See :meth:`Store.fetch`.

        :raise KernelError: the disk failed.
        """
        file = self._opened()
        for fd, offset, begin, end in self._runs(file, locators):
            part = into[begin * PAGE_SIZE : end * PAGE_SIZE]
            aligned = part if part.ctypes.data % PAGE_SIZE == 0 else self._staging[: part.size]
            try:
                done = os.preadv(fd, [aligned.data], offset)
            except OSError as error:
                raise KernelError(f"read at {offset} of swap file {self.name}", error.errno or errno.EIO) from error
            if done != part.size:
                raise DamagedPageError(f"swap file {self.name} ends before byte {offset + part.size}")
            if aligned is not part:
                part[:] = aligned
        wrong = np.flatnonzero(page_digests(into[: locators.size * PAGE_SIZE]) != self._digests()[locators])
        if wrong.size:
            raise DamagedPageError(
                f"{wrong.size} of {locators.size} pages read from swap file {self.name} are not what was put there, "
                f"the first is slot {locators[wrong[0]]}"
            )
        self._fetched += locators.size

    def drop(self, locators: NDArray[np.uint64]) -> None:
        """See :meth:`Store.drop`."""
        self.taken[locators] = 0

    def retain(self, locators: NDArray[np.uint64]) -> None:
        """See :meth:`Store.retain`."""
        kept = np.zeros(self.taken.size, dtype=np.uint8)
        kept[locators] = 1
        self.taken[:] = kept
        self.trim(0)

    def trim(self, keep: int = _KEPT) -> None:
        """Give back the units that no page is in, but ``keep`` of them."""
        with self._allocating:
            self._trim(self._opened(), keep)

    def _trim(self, file: SwapFile, keep: int) -> None:
        empty = np.flatnonzero((self.lent > 0) & ~self.taken.reshape(-1, UNIT_PAGES).any(axis=1)).tolist()[keep:]
        lent = [unit for unit in empty if self.lent[unit] >= _LENT]
        if lent:
            ours = (self.lent[lent] - _LENT).tolist()
            self.lent[lent] = 0
            self._reservation.return_lent(file, ours)
        own = [unit for unit in empty if self.lent[unit] == 1]
        if own:
            self.lent[self._reservation.give_back(file, own)] = 0

    def statistics(self) -> StoreStatistics:
        """A frozen snapshot."""
        return StoreStatistics(self._used(), self.room, self._put, self._fetched)

    def close(self) -> None:
        """Idempotent; the file stays, and what is in it."""
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None
            del self.taken, self.digests, self.lent
            self._reservation.close()


@njit(
    types.UniTuple(types.int64, 2)(  # type: ignore[no-untyped-call]
        types.uint8[:, ::1], types.int64[::1], types.int64, types.int64, types.int64
    ),
    cache=True,
    nogil=True,
)
def _next_unit(taken: NDArray[np.uint8], lent: NDArray[np.int64], unit: int, seen: int, least: int) -> tuple[int, int]:
    """The next unit from ``unit`` on, around, that may be written to and has ``least`` free slots; -1: there is none.

    :param seen: how many were looked at before; and, returned, are now.
    """
    while seen < lent.size:
        if lent[unit] > 0:
            free = 0
            for slot in range(taken.shape[1]):
                free += taken[unit, slot] == 0
            if free >= least:
                return unit, seen
        unit = (unit + 1) % lent.size
        seen += 1
    return -1, seen
