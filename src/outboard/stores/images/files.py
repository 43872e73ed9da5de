"""The files that images lie in: who they are, and reads that are whole or fail.

They are opened read-only and without QEMU's locks, which only tell other QEMUs apart; nothing here writes to one.

Sources: open(2), pread(2), lseek(2), fcntl(2) on leases.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from pathlib import Path
from typing import Self

import msgspec

from outboard.errors import KernelError, NotFoundError, RefusedError


class Identity(msgspec.Struct, frozen=True):
    """A file as it was at an instant: as long as it has the same, nobody has written to it or replaced it.

    ``size`` in bytes, ``modified`` and ``changed`` in nanoseconds since 1970.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class ImageFile:
    """A regular file or a block device, opened for reading; a context manager that closes it.

    :raise NotFoundError: it is not there.
    :raise RefusedError: ``image-kind``: it is neither.
    :raise KernelError: it cannot be opened.

    Synchronization: any thread reads; one leases and closes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A FIFO would wait for its writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError(f"the disk image {path} is not there") from error
        except OSError as error:
            raise KernelError(f"open of the disk image {path}", error.errno or errno.EIO) from error
        kind = os.fstat(self._fd).st_mode
        self.is_device = stat.S_ISBLK(kind)
        if not (stat.S_ISREG(kind) or self.is_device):
            os.close(self._fd)
            raise RefusedError("image-kind", f"{path} is neither a file nor a block device, and cannot hold a disk")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Idempotent. A lease goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def size(self) -> int:
        """Bytes."""
        return os.lseek(self._fd, 0, os.SEEK_END) if self.is_device else os.fstat(self._fd).st_size

    def identity(self) -> Identity:
        """Who it is now; of a device the times say nothing."""
        found = os.fstat(self._fd)
        device = found.st_rdev if self.is_device else found.st_dev
        return Identity(device, found.st_ino, self.size, found.st_mtime_ns, found.st_ctime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on; what lies behind the end reads as zeros.

        :raise KernelError: the read failed.
        """
        at = 0
        while at < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[at:]], offset + at)
            except OSError as error:
                what = f"read of {len(buffer)} bytes at {offset} of {self.path}"
                raise KernelError(what, error.errno or errno.EIO) from error
            if not got:
                buffer[at:] = bytes(len(buffer) - at)
                return
            at += got

    def read(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raise RefusedError: ``image-damaged``: the file ends before. :raise KernelError: the read failed.
        """
        if offset + length > self.size:
            raise RefusedError(
                "image-damaged",
                f"{self.path} names {length} bytes at {offset}, and ends at {self.size}; qemu-img check tells more",
            )
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def extents(self) -> list[tuple[int, int]]:
        """(offset, length) of what is no hole."""
        end, at, found = self.size, 0, []
        if self.is_device:
            return [(0, end)]
        while at < end:
            try:
                data = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:
                # ENXIO: nothing but a hole up to the end.
                break
            at = os.lseek(self._fd, data, os.SEEK_HOLE)
            found.append((data, at - data))
        return found

    def lease(self) -> bool:
        """Have the kernel see to it that nobody opens the file for writing unannounced; whether it does.

        It does not where somebody has it open for writing, nor for devices and most file systems of a network. Whoever
        wants to write from then on waits until the lease is given up, or some 45 s have passed;
        :attr:`leased` says so meanwhile.
        """
        try:
            # The kernel announces it by SIGIO, which ends a process that does not expect it; by this one it does not.
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            return False
        return True

    def give_up_lease(self) -> None:
        """Let whoever waits for it write. Idempotent."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    @property
    def leased(self) -> bool:
        """Whether the lease stands and nobody waits for its end."""
        return fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK
