"""The state of a reservation: a lock, what was reserved, and the move that is under way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from outboard.errors import OutboardError
from outboard.stores.moving import Way

_HEAD, _INTENT, _SIZE = 0, 4096, 4096
"""Where they lie in the file, and what each has of it."""


class Head(msgspec.Struct, frozen=True):
    """What was reserved; ``blocks`` of 512 bytes, of all files together."""

    units: int
    blocks: int
    way: Way
    boot: str


class Intent(msgspec.Struct, frozen=True):
    """Which unit of which swap file and of the reservation are being moved; ``ours`` None: no unit moves, but what all
    files take together may change."""

    file: str
    unit: int
    ours: int | None


class State:
    """The file ``state`` in ``directory``, made if it is not there.

    :raise OSError: it cannot be.

    Synchronization: any number of processes; within one, one thread.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.fd = os.open(directory / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock (flock(2))."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def head(self) -> Head | None:
        """What was reserved; None: nothing yet, or somebody died while he did.

        :raise OutboardError: that is no record of a reservation.
        """
        text = self._read(_HEAD)
        try:
            return msgspec.json.decode(text, type=Head) if text else None
        except msgspec.DecodeError as error:
            raise OutboardError(
                f"{self._directory / 'state'} is no record of a reservation ({error}); with no VM running, remove "
                f"{self._directory} to reserve anew"
            ) from error

    def keep(self, head: Head | None) -> None:
        """What is reserved from now on."""
        self._write(_HEAD, b"" if head is None else msgspec.json.encode(head))

    def intent(self) -> Intent | None:
        """The move that somebody has died over."""
        text = self._read(_INTENT)
        return msgspec.json.decode(text, type=Intent) if text else None

    def intend(self, intent: Intent | None) -> None:
        """The move that is under way now; None: none is."""
        self._write(_INTENT, b"" if intent is None else msgspec.json.encode(intent))

    def _read(self, at: int) -> bytes:
        return os.pread(self.fd, _SIZE, at).rstrip(b"\0")

    def _write(self, at: int, text: bytes) -> None:
        os.pwrite(self.fd, text.ljust(_SIZE, b"\0"), at)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
