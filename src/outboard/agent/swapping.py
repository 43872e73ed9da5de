"""Where the swapped pages of a VM go: a file that grows as it can, or one whose blocks are reserved."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from outboard.pages import PAGE_SIZE
from outboard.stores.file import FileStore, remove
from outboard.stores.reservation import Reservation
from outboard.stores.swap import SwapStore


class PlainSwap(msgspec.Struct, frozen=True, tag="plain"):
    """The file at ``path``; ``kept`` bytes of the VM's memory never go there."""

    path: str
    kept: int = 0

    def open(self, pages: int, beside: Path) -> FileStore:  # noqa: ARG002  # the other kind's signature
        """The store for a guest of ``pages`` pages; errors as :class:`~outboard.stores.file.FileStore`."""
        Path(self.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileStore(Path(self.path), pages)

    def remove(self) -> None:
        """Leave nothing behind. Idempotent."""
        remove(Path(self.path))


class ReservedSwap(msgspec.Struct, frozen=True, tag="reserved"):
    """The swap file of ``vm`` in the reservation of ``size`` bytes in ``directory``."""

    directory: str
    size: int
    vm: str
    kept: int = 0

    def open(self, pages: int, beside: Path) -> FileStore:
        """The store for a guest of ``pages`` pages; errors as :class:`~outboard.stores.reservation.Reservation`.

        :param beside: a directory on tmpfs, the same for a successor.
        """
        room = max(1, pages - self.kept // PAGE_SIZE)
        return SwapStore(Reservation(Path(self.directory), self.size), self.vm, room, beside)

    def remove(self) -> None:
        """Give every block back. Idempotent."""
        with contextlib.closing(Reservation(Path(self.directory), self.size)) as reservation:
            reservation.discard(self.vm)


Swapping = PlainSwap | ReservedSwap
