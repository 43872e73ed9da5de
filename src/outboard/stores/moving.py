"""How a unit of blocks moves between two files of a file system: from where it is into a hole of the other.

Sources: ioctl_xfs_exchange_range(2), ioctl_ficlonerange(2), fallocate(2), fiemap.rst.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from outboard.errors import KernelError, RefusedError
from outboard.linux import fallocate, fiemap, reflink, statfs, xfs
from outboard.pages import PAGE_SIZE

UNIT = 1 << 20
"""Bytes that move as one."""
UNIT_PAGES = UNIT // PAGE_SIZE
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TRIAL = 16 * PAGE_SIZE


class Way(Enum):
    """How a unit gets from the reservation to a swap file."""

    EXCHANGE = "exchange"
    CLONE = "clone"
    LEND = "lend"
    ALLOCATE = "allocate"


def require_file_system(directory: Path, fd: int) -> None:
    """Refuse where an allocated block is not one's own, or nobody can say.

    :raise RefusedError: ``swap-file-system``.
    """
    kind = statfs.of(fd).type
    if kind in (statfs.EXT4_SUPER_MAGIC, statfs.XFS_SUPER_MAGIC):
        return
    if kind == statfs.BTRFS_SUPER_MAGIC:
        why = "is on btrfs, which writes to new blocks instead of those that were allocated"
    elif kind == statfs.TMPFS_MAGIC:
        why = "is on tmpfs, which is memory"
    else:
        why = f"is on a file system (type {kind:#x}) of which it is not known that what is allocated can be written"
    raise RefusedError("swap-file-system", f"{directory} {why}; put the swap reservation on ext4 or XFS")


def way_of(directory: Path, *, thin: bool) -> Way:
    """What the file system of a directory can do: it is tried, on files without a name.

    :param thin: where no block can move, swap files get others, instead of being lent units where they lie.
    :raise KernelError: it cannot even do that.
    """
    one = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    other = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(one, bytes(_TRIAL), 0)
        os.fsync(one)
        os.ftruncate(other, _TRIAL)
        for way, move in ((Way.EXCHANGE, xfs.exchange), (Way.CLONE, reflink.clone)):
            try:
                move(one, 0, other, 0, _TRIAL)
            except KernelError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                    raise
            else:
                return way
        return Way.ALLOCATE if thin else Way.LEND
    finally:
        os.close(one)
        os.close(other)


def mapped(fd: int, unit: int) -> int:
    """How many bytes of a unit have blocks."""
    begin, end = unit * UNIT, (unit + 1) * UNIT
    return sum(min(end, one.offset + one.length) - max(begin, one.offset) for one in fiemap.extents(fd, begin, UNIT))


def is_mapped(fd: int, unit: int) -> bool:
    """Whether all of a unit has blocks."""
    return mapped(fd, unit) == UNIT


def units_of(fd: int, length: int) -> list[int]:
    """The units of a file, up to ``length``, that have any."""
    found: set[int] = set()
    for one in fiemap.extents(fd, 0, length):
        found.update(range(one.offset // UNIT, -(-(one.offset + one.length) // UNIT)))
    return sorted(found)


def move(way: Way, source: int, at: int, target: int, to: int, make_room: Callable[[], bool]) -> bool:
    """Move unit ``at`` of one file into the hole at unit ``to`` of another; whether that worked.

    If not, for want of room, then nothing has changed.

    :param make_room: called where the file system wants some for its own books, for a moment; whether there was any.
    """
    if way is Way.ALLOCATE:
        return _allocate_and_punch(source, at, target, to, make_room)
    for one in (way, Way.CLONE):
        try:
            if one is Way.EXCHANGE:
                xfs.exchange(source, at * UNIT, target, to * UNIT, UNIT)
            else:
                reflink.clone(source, at * UNIT, target, to * UNIT, UNIT)
                punch(source, at, make_room)
        except KernelError as error:
            if error.errno not in (*NO_ROOM, errno.EOPNOTSUPP):
                raise
            if mapped(source, at) == 0 and is_mapped(target, to):
                return True
            punch(target, to, make_room)
            # It is lent, rather: what is moved by what the ballast frees costs the file system blocks of no file's.
            if error.errno in NO_ROOM:
                return False
        else:
            return True
    return False


def punch(fd: int, unit: int, make_room: Callable[[], bool]) -> None:
    """Let go of a unit's blocks; for its own books XFS wants a few free ones even for that."""
    while True:
        try:
            fallocate.punch(fd, unit * UNIT, UNIT)
        except KernelError as error:
            if error.errno not in NO_ROOM or not make_room():
                raise
        else:
            return


def _allocate_and_punch(source: int, at: int, target: int, to: int, make_room: Callable[[], bool]) -> bool:
    try:
        fallocate.allocate(target, to * UNIT, UNIT)
    except KernelError as error:
        if error.errno not in NO_ROOM:
            raise
    # ext4 has been seen to say that there was no room, and to have found it.
    if not is_mapped(target, to):
        punch(target, to, make_room)
        return False
    punch(source, at, make_room)
    return True
