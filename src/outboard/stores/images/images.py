"""All images of a VM's disks, numbered: first those of its first disk from the top down, then those of the next.

Two hosts that open the same disks give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import msgspec

from outboard.errors import KernelError, NotFoundError, RefusedError
from outboard.stores.images.files import ImageFile
from outboard.stores.images.layers import DiskSpec, Layer, close_layers, open_layers

MOST = 1 << 10
"""Images of one VM."""


class Left(msgspec.Struct, frozen=True):
    """A disk that is left out: a stable word for why, and a sentence."""

    path: str
    reason: str
    words: str


class Images:
    """The images of ``disks``, opened; a context manager that closes them.

    ``layers`` are those that can be read, ``left`` the disks that cannot.

    Synchronization: any thread reads; one closes.
    """

    def __init__(self, disks: Iterable[DiskSpec]) -> None:
        self.layers: list[Layer] = []
        self.left: list[Left] = []
        for number, disk in enumerate(disks):
            try:
                found = open_layers(disk, number)
            except RefusedError as error:
                self.left.append(Left(disk.path, error.reason, str(error)))
            except NotFoundError as error:
                self.left.append(Left(disk.path, "image-missing", str(error)))
            except KernelError as error:
                self.left.append(Left(disk.path, "image-unreadable", str(error)))
            else:
                if len(self.layers) + len(found) > MOST:
                    close_layers(found)
                    self.left.append(Left(disk.path, "image-count", f"{disk.path}: there are more than {MOST} images"))
                    continue
                self.layers += found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def files(self) -> list[ImageFile]:
        """The files of ``layers``."""
        return [layer.file for layer in self.layers]

    def close(self) -> None:
        """Idempotent."""
        close_layers(self.layers)
