"""A reservation of swap space: the most that may ever be swapped out, allocated on the disk beforehand.

The directory holds

==============  ======================================================================================
reservation     the blocks that nobody has taken yet; thick: really allocated, and written
ballast         a little more, which pays for the extent trees of all files as they grow
vms/NAME        the swap file of a VM; thin: it has the units that it has taken, and holes elsewhere
state           held (flock(2)) while blocks move; the size, what was measured, and the intent
map             for each unit of the reservation: here, gone into a swap file, lent, or lost
==============  ======================================================================================

Blocks move in units of a mebibyte. A swap-out that needs one takes it from the reservation, a unit that has become
empty goes back, and the blocks of all files together stay the same. How a unit moves depends on the file system:

* *exchange* (XFS made for it, Linux 6.10): XFS_IOC_EXCHANGE_RANGE lets a unit and a hole change places, atomically;
* *clone* (XFS with reflink): the swap file's hole is made to share the unit, and the reservation lets go of it;
* *allocate* (ext4): a unit is allocated in the swap file, then one is punched out of the reservation; between the two
  steps there is one more. In the other order a block would be nobody's for a moment, and whoever writes to a full disk
  could snatch it. (EXT4_IOC_MOVE_EXT exchanges what both files have, and moves nothing into a hole.) Both steps, and
  the first write to new blocks, are changes of the file system's own books, and take longer than writing the pages.
* *lend* (the same, where swap files need not be ``thin``): nothing moves. Pages go into the unit where it lies, in the
  reservation itself, and the swap file keeps a hole; the unit is lent until it is empty again. That takes nothing from
  the disk.

A full disk may have no room for what a move needs. It does not matter: where a unit cannot move it is lent. Only where
a swap file is removed, or somebody has died over a move, on a full disk, blocks are free for a moment; what is snatched
then is *lost* until the disk has room again, and ``SPARE`` units more than promised are reserved against that.

Before a unit moves the intent names it, so that whoever takes the lock after a death can finish: a unit must be here
whole and not there, or there whole and not here; anything else is undone, by punching it there and allocating it here.
Neither needs what was in it, for a unit moves only while no page is. Power cuts void what swap files hold; after one
the first to come takes all units back.

Sources: fallocate(2), ioctl_xfs_exchange_range(2), ioctl_ficlonerange(2), Linux Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError, StoreFullError
from outboard.linux import fallocate, fiemap
from outboard.pages.shared import file_array, shared_array
from outboard.stores import moving
from outboard.stores.ballast import Ballast, ballast_of
from outboard.stores.moving import NO_ROOM, UNIT, Way, is_mapped, mapped, require_file_system, units_of, way_of
from outboard.stores.reservation_state import Head, Intent, State
from outboard.stores.thick import make_thick

SPARE = 4
"""Units that are reserved beyond what is promised."""
_HERE, _GONE, _LOST = 0, -1, -2
"""In the map; a number above 0 is the inode of the swap file that the unit is lent to."""
_UNMOVED = (Way.LEND, Way.ALLOCATE)
"""Where blocks cannot move: as swap files are not, or are, to be thin."""
_COMMITS = 4
"""How often to look for room on a full disk."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class ReservationStatistics:
    """How things are; sizes in bytes, ``blocks`` of 512 bytes as st_blocks counts them.

    ``promisable`` is what may be promised, ``here`` untouched, ``moved`` in swap files, ``lent`` to them, ``lost`` to
    others on a full disk and not regained yet. ``blocks`` should be ``blocks_reserved`` at every instant without loss.
    """

    way: str
    promisable: int
    here: int
    moved: int
    lent: int
    lost: int
    blocks: int
    blocks_reserved: int


class Reservation:
    """The reservation of ``size`` bytes (whole units) in ``directory``, made if it is not there.

    :param make: otherwise it must be there, with that size.
    :param thin: whether swap files get blocks of their own even where these cannot move; None: as until now (True).

    ``way``: how units move.

    :raise RefusedError: ``swap-file-system``: blocks cannot be kept on this file system; ``swap-space``: they are not
        there; ``swap-in-use``: it is there with another size, and some of it is taken; ``swap-not-made``.
    :raise KernelError: the kernel refused.

    Synchronization: any number of processes; within one, one thread. Blocks move under a lock of the kernel's.
    """

    def __init__(self, directory: Path, size: int, *, make: bool = True, thin: bool | None = None) -> None:
        if size <= 0 or size % UNIT:
            raise RefusedError("swap-size", f"a reservation of {size} bytes: it must be a multiple of {UNIT >> 20} MiB")
        self.directory = directory
        self.units = size // UNIT + SPARE
        self._files = directory / "vms"
        with contextlib.ExitStack() as undo:
            try:
                self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._state = State(directory)
            except OSError as error:
                raise KernelError(f"making the reservation in {directory}", error.errno or errno.EIO) from error
            undo.callback(self._state.close)
            require_file_system(directory, self._state.fd)
            self._zeros: NDArray[np.uint8] = shared_array(UNIT, np.uint8)
            with self._state.locked():
                self._open(undo, make=make, thin=thin)
            undo.pop_all()

    # Opening and making

    def _open(self, undo: contextlib.ExitStack, *, make: bool, thin: bool | None) -> None:
        head = self._state.head()
        if head is not None and head.units != self.units:
            if any(self._files.iterdir()):
                raise RefusedError(
                    "swap-in-use",
                    f"{self.directory} reserves {head.units - SPARE} MiB, of which VMs have taken some; "
                    f"{self.units - SPARE} MiB can be reserved there when no VM is managed",
                )
            head = None
        if head is None:
            if not make:
                raise RefusedError(
                    "swap-not-made",
                    f"{(self.units - SPARE)} MiB are not reserved in {self.directory} yet; outboard agent does that as "
                    "it starts",
                )
            self._state.keep(None)
            self._state.intend(None)
            size = self.units * UNIT
            sizes = {"reservation": size, "ballast": ballast_of(size), "map": self.units * 8}
            make_thick(self.directory, sizes)
        self._map: NDArray[np.int64] = file_array(self.directory / "map", self.units, np.int64)
        self._ours = os.open(self.directory / "reservation", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        undo.callback(os.close, self._ours)
        self._ballast = Ballast(self.directory / "ballast")
        undo.callback(self._ballast.close)
        if head is None:
            way = way_of(self.directory, thin=thin is not False)
            head = Head(self.units, self._measure(), way, _BOOT.read_text())
            self._state.keep(head)
        elif thin is not None and head.way in _UNMOVED and head.way is not _UNMOVED[thin]:
            # What is lent, and what has moved, stays that until it is empty.
            head = msgspec.structs.replace(head, way=_UNMOVED[thin])
            self._state.keep(head)
        self.way, self._blocks = head.way, head.blocks
        if head.boot != _BOOT.read_text():
            self._start_over()
            self._state.keep(msgspec.structs.replace(head, boot=_BOOT.read_text()))

    def _start_over(self) -> None:
        """After a power cut: what swap files hold is nobody's any more."""
        self._state.intend(None)
        for k in range(self.units):
            self._map[k] = _HERE if is_mapped(self._ours, k) else _GONE
        for path in list(self._files.iterdir()):
            self._empty(path)
            path.unlink()
        for k in self._at(_GONE):
            self._restore(k)
        self._balance()

    # Moving

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, with everything in order."""
        with self._state.locked():
            intent = self._state.intent()
            if intent is not None:
                self._mend(intent)
                self._state.intend(None)
            yield

    @contextlib.contextmanager
    def _intending(self, file: str, unit: int = 0, k: int | None = None) -> Iterator[None]:
        """Around a move and the balance after it; what raises in between is mended by whoever comes next."""
        self._state.intend(Intent(file, unit, k))
        yield
        self._state.intend(None)

    def _mend(self, intent: Intent) -> None:
        """Finish or undo what somebody died over."""
        k = intent.ours
        if k is None:
            self._balance()
            return
        with contextlib.ExitStack() as open_:
            theirs = False
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self._files / intent.file, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
                open_.callback(os.close, fd)
                theirs = is_mapped(fd, intent.unit)
                if theirs and mapped(self._ours, k) == 0:
                    self._fill(fd, intent.unit)
                else:
                    theirs = False
                    self._punch(fd, intent.unit)
        self._map[k] = _GONE
        if not theirs:
            self._restore(k)
        self._balance()

    def _restore(self, k: int) -> None:
        """Have a unit here that is nowhere; it is lost, for now, if the disk is full."""
        while not (is_there := self._allocate(self._ours, k)) and self._ballast.give():
            pass
        if is_there:
            self._fill(self._ours, k)
            self._map[k] = _HERE
        else:
            self._map[k] = _LOST

    def _allocate(self, fd: int, unit: int) -> bool:
        """Allocate a unit; whether there was room, if not then none of it is."""
        for _ in range(_COMMITS):
            try:
                fallocate.allocate(fd, unit * UNIT, UNIT)
            except KernelError as error:
                if error.errno not in NO_ROOM:
                    raise
            if is_mapped(fd, unit):
                return True
            # ext4 gives out what was punched when its journal has been committed.
            os.fsync(self._ours)
            os.fsync(fd)
        self._punch(fd, unit)
        return False

    def _punch(self, fd: int, unit: int) -> None:
        moving.punch(fd, unit, self._ballast.give)

    def _fill(self, fd: int, unit: int) -> None:
        """Write a unit that is allocated only."""
        if any(one.flags & fiemap.ExtentFlag.UNWRITTEN for one in fiemap.extents(fd, unit * UNIT, UNIT)):
            self._write_first(fd, unit, self._zeros[:0])

    def take(self, file: SwapFile, unit: int, content: NDArray[np.uint8]) -> tuple[int | None, bool]:
        """Have ``unit`` of a swap file get blocks.

        :param content: the first that is to be written there, up to a unit.
        :return: the unit of the reservation that is lent instead, if none could move; and whether ``content`` has been
            written already.
        :raise StoreFullError: more was promised than is reserved.
        """
        with self._locked():
            self._regain()
            if self.way is Way.LEND:
                return self._lend(file), False
            k = self._first(_HERE)
            with self._intending(file.name, unit, k):
                moved = self._move(self._ours, k, file.fd, unit)
                if moved:
                    self._map[k] = _GONE
                    written = self.way is Way.ALLOCATE
                    if written:
                        self._write_first(file.fd, unit, content)
                self._balance()
            if moved:
                return None, written
            return self._lend(file), False

    def _lend(self, file: SwapFile) -> int:
        k = self._first(_HERE)
        self._fill(self._ours, k)
        self._map[k] = file.inode
        return k

    def _write_first(self, fd: int, unit: int, content: NDArray[np.uint8]) -> None:
        """Write a unit whole: its extents stay as they are from then on."""
        try:
            self._zeros[: content.size] = content
            if os.pwrite(fd, self._zeros.data, unit * UNIT) != UNIT:
                raise KernelError(f"write of a unit to a swap file in {self._files}", errno.EIO)
        finally:
            self._zeros[:] = 0

    def _first(self, kind: int) -> int:
        found = self._map == kind
        first = int(found.argmax())
        if not found[first]:
            raise StoreFullError(
                f"no unit of {self.directory} is left: more was promised than the {self.units - SPARE} MiB reserved"
            )
        return first

    def _move(self, source: int, at: int, target: int, to: int) -> bool:
        return moving.move(self.way, source, at, target, to, self._ballast.give)

    def give_back(self, file: SwapFile, units: list[int]) -> list[int]:
        """Take units of a swap file back that no page is in; those that came, on a full disk perhaps not all."""
        with self._locked():
            return [unit for unit in units if self._take_back(file.name, file.fd, unit, by_force=False)]

    def _take_back(self, name: str, fd: int, unit: int, *, by_force: bool) -> bool:
        """Move a unit out of a swap file; ``by_force``: rather lose it than leave it there."""
        if not self._count(_GONE):
            # Of a move that a power cut has doubled.
            self._punch(fd, unit)
            return True
        k = self._first(_GONE)
        with self._intending(name, unit, k):
            came = self._move(fd, unit, self._ours, k)
            while by_force and not came and self._ballast.give():
                came = self._move(fd, unit, self._ours, k)
            if came:
                self._map[k] = _HERE
            elif by_force:
                self._punch(fd, unit)
                self._restore(k)
            self._balance()
        return came or by_force

    def return_lent(self, file: SwapFile, ours: list[int]) -> None:
        """Take back units that were lent, and that no page is in."""
        with self._locked():
            for k in ours:
                if self._map[k] == file.inode:
                    self._map[k] = _HERE

    # Counting

    def _at(self, kind: int) -> list[int]:
        """The units of a kind."""
        return np.flatnonzero(self._map == kind).tolist()

    def _count(self, kind: int) -> int:
        return int(np.count_nonzero(self._map == kind))

    def _regain(self) -> None:
        for k in self._at(_LOST):
            self._restore(k)
            if self._map[k] == _LOST:
                return

    def _balance(self) -> None:
        """Grow or shrink the ballast by what extent trees have shrunk or grown."""
        for _ in range(3):
            wanted = self._blocks - self._count(_LOST) * (UNIT // 512) - self._measure()
            if not wanted or not self._ballast.change(wanted):
                return

    def _measure(self) -> int:
        """The blocks of all files together."""
        total = os.fstat(self._ours).st_blocks + self._ballast.blocks
        with os.scandir(self._files) as entries:
            return total + sum(entry.stat(follow_symlinks=False).st_blocks for entry in entries)

    def statistics(self) -> ReservationStatistics:
        """A frozen snapshot."""
        with self._locked():
            lost, gone, here = (self._count(kind) for kind in (_LOST, _GONE, _HERE))
            return ReservationStatistics(
                way=self.way.value,
                promisable=(self.units - SPARE) * UNIT,
                here=here * UNIT,
                moved=gone * UNIT,
                lent=(self.units - lost - gone - here) * UNIT,
                lost=lost * UNIT,
                blocks=self._measure(),
                blocks_reserved=self._blocks,
            )

    # Swap files

    def fileno(self) -> int:
        """The reservation itself, where units are lent."""
        return self._ours

    def open(self, name: str, units: int) -> SwapFile:
        """The swap file ``name``, ``units`` long, made if it is not there.

        :raise StoreFullError: the disk has no room even for its name.
        """
        with self._locked(), self._intending(name):
            self._regain()
            path = self._files / name
            while True:
                try:
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
                    os.ftruncate(fd, units * UNIT)
                    break
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise KernelError(f"open of the swap file {path}", error.errno or errno.EIO) from error
                    if not self._ballast.give():
                        raise StoreFullError(f"the disk of {path} is full: the swap file cannot be made") from error
            self._balance()
            return SwapFile(name, fd, os.fstat(fd).st_ino)

    def held(self, file: SwapFile, units: int) -> NDArray[np.bool_]:
        """Which units of a swap file have blocks."""
        with self._locked():
            found = np.zeros(units, dtype=np.bool_)
            found[units_of(file.fd, units * UNIT)] = True
            return found

    def lent_to(self, file: SwapFile) -> set[int]:
        """The units that are lent to a swap file."""
        with self._locked():
            return set(self._at(file.inode))

    def discard(self, name: str) -> None:
        """Remove a swap file, whose units come back. Idempotent."""
        with self._locked():
            path = self._files / name
            if path.exists():
                self._empty(path)
                with self._intending(name):
                    path.unlink()
                    self._balance()

    def names(self) -> dict[str, int]:
        """The swap files, with the blocks (of 512 bytes) of each."""
        return {path.name: path.stat().st_blocks for path in self._files.iterdir()}

    def lent_by_name(self) -> dict[str, int]:
        """Bytes that are lent to each swap file to which any are."""
        with self._locked():
            counts = {path.name: self._count(path.stat().st_ino) for path in self._files.iterdir()}
        return {name: count * UNIT for name, count in counts.items() if count}

    def _empty(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        try:
            for k in self._at(os.fstat(fd).st_ino):
                self._map[k] = _HERE
            for unit in units_of(fd, os.fstat(fd).st_size):
                self._take_back(path.name, fd, unit, by_force=True)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Idempotent; everything stays where it is."""
        if self._state.fd >= 0:
            os.close(self._ours)
            self._ballast.close()
            self._state.close()
            del self._map


@dataclass(frozen=True, slots=True)
class SwapFile:
    """An open swap file."""

    name: str
    fd: int
    inode: int
