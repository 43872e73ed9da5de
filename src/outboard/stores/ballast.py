"""Ballast: a file whose blocks pay for what other files' extent trees take as they grow."""

from __future__ import annotations

import os
from pathlib import Path

from outboard.linux import fallocate
from outboard.stores.moving import NO_ROOM, UNIT

_LEAST, _SHARE = 4 << 20, 1024


def ballast_of(size: int) -> int:
    """How much ballast goes with a reservation of ``size`` bytes."""
    return _LEAST + size // _SHARE


class Ballast:
    """The ballast in the file ``path``, which is there.

    Synchronization: whoever holds the reservation's lock.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def blocks(self) -> int:
        """Of 512 bytes."""
        return os.fstat(self._fd).st_blocks

    def give(self) -> bool:
        """Leave the disk some of it, for a moment; False: there is nothing left."""
        # Its size is what is allocated to it, but for its own extent tree.
        size = os.fstat(self._fd).st_size
        os.ftruncate(self._fd, max(0, size - UNIT))
        return size > 0

    def change(self, blocks: int) -> bool:
        """Grow or shrink by blocks of 512 bytes; whether the disk had room for that."""
        size = os.fstat(self._fd).st_size
        try:
            if blocks > 0:
                # What it has already XFS would want free again.
                fallocate.allocate(self._fd, size, blocks * 512)
            else:
                os.ftruncate(self._fd, max(0, size + blocks * 512))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            return False
        return True

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
