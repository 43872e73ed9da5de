"""Making the files of a reservation: every block allocated and written, or none of the files there."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from outboard.errors import KernelError, RefusedError
from outboard.linux import fallocate
from outboard.pages.shared import shared_array
from outboard.stores.moving import NO_ROOM, UNIT


def make_thick(directory: Path, sizes: Mapping[str, int]) -> None:
    """Make files of so many bytes in ``directory``, over what is there of those names.

    :raise RefusedError: ``swap-space``: they do not fit.
    :raise KernelError: the kernel refused otherwise.
    """
    try:
        for name in sizes:
            (directory / name).unlink(missing_ok=True)
        for name, size in sizes.items():
            fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fallocate.allocate(fd, 0, size)
                _write_whole(fd, size)
            finally:
                os.close(fd)
    except OSError as error:
        for name in sizes:
            (directory / name).unlink(missing_ok=True)
        if error.errno in NO_ROOM:
            free = os.statvfs(directory)
            raise RefusedError(
                "swap-space",
                f"a swap reservation of {sum(sizes.values()) >> 20} MiB does not fit into {directory}, where "
                f"{free.f_bavail * free.f_frsize >> 20} MiB are free; reserve less, or make room",
            ) from error
        raise KernelError(f"making the reservation in {directory}", error.errno or errno.EIO) from error


def _write_whole(fd: int, length: int) -> None:
    """What was never written is cloned as a hole, and splits the extent tree when it is."""
    zeros = shared_array(UNIT, np.uint8)
    for at in range(0, length, UNIT):
        part = zeros[: min(UNIT, length - at)].data
        if os.pwrite(fd, part, at) != len(part):
            raise OSError(errno.ENOSPC, "short write")
    os.fsync(fd)
    # It is not to be read again.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
