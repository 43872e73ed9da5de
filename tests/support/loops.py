"""File systems of their own, on loop devices: they can be filled up, and differ in what they can do."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outboard.errors import KernelError
from outboard.linux import fallocate
from outboard.stores.reservation import Reservation

KINDS = ("ext4", "xfs", "xfs-exchange")
"""File systems; :func:`mounted` knows ``ext4-lent`` too, on which swap files need not be thin."""
_SIZE = 320 << 20
_INCOMPAT, _CRC, _EXCHANGE = 216, 224, 1 << 6


@contextlib.contextmanager
def mounted(kind: str, directory: Path, size: int = _SIZE) -> Iterator[Path]:
    """Make a file system of one of KINDS, 320 MiB large or ``size``, in ``directory``; where it is mounted."""
    image, place = directory / f"{kind}.img", directory / kind
    with image.open("wb") as file:
        file.truncate(size)
    if kind.startswith("ext4"):
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", str(image))
    else:
        _run("mkfs.xfs", "-q", "-f", str(image))
    if kind == "xfs-exchange":
        _allow_exchange(image)
    place.mkdir()
    _run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        # Who has failed has files open there.
        _run("umount", "--lazy", str(place))
        image.unlink()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _allow_exchange(image: Path) -> None:
    """Do as ``mkfs.xfs -i exchange=1`` of xfsprogs 6.10 does: one bit in each superblock."""
    with image.open("r+b") as file:
        head = file.read(512)
        (block,), (blocks, groups) = struct.unpack_from(">I", head, 4), struct.unpack_from(">II", head, 84)
        for group in range(groups):
            file.seek(group * blocks * block)
            sector = bytearray(file.read(512))
            (old,) = struct.unpack_from(">I", sector, _INCOMPAT)
            struct.pack_into(">I", sector, _INCOMPAT, old | _EXCHANGE)
            struct.pack_into("<I", sector, _CRC, 0)
            struct.pack_into("<I", sector, _CRC, _crc32c(bytes(sector)))
            file.seek(group * blocks * block)
            file.write(sector)


def reserve(directory: Path, size: int) -> Reservation:
    """A reservation on such a file system, with thin swap files but on that which is named so."""
    return Reservation(directory, size, thin="ext4-lent" not in directory.parts)


def fill(place: Path, keep: int = 0) -> Path:
    """Fill a file system up by a file, to the last block or until ``keep`` bytes are free; the file."""
    path = place / "filler"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        at = os.fstat(fd).st_size
        for step in (16 << 20, 1 << 20, 65536, 4096):
            while True:
                free = os.statvfs(place)
                if free.f_bfree * free.f_bsize < keep + step and keep:
                    break
                try:
                    fallocate.allocate(fd, at, step)
                except KernelError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    break
                at += step
    finally:
        os.close(fd)
    return path
