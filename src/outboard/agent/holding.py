"""Holding: one engine at a time has a guest, by a lock in the guest's directory.

The lock (flock(2)) ends with its holder, whose pid is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from enum import Enum
from pathlib import Path

from outboard.agent.orders import HandOver, ask
from outboard.errors import RefusedError

CONTROL = "control.sock"
_HAND_OVER_S = 10.0


def hold(directory: Path, *, successor: bool) -> int:
    """The lock of ``directory``, which is made; a descriptor to be closed when the guest is let go.

    :param successor: ask an engine that has it to hand it over.
    :raise RefusedError: ``managed``: another engine has it.
    """
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _HAND_OVER_S
        asked = not successor
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever released the guest has removed the directory, and with it the lock that we have open.
                directory.mkdir(mode=0o750, parents=True, exist_ok=True)
                if owner(directory, fd) is Owner.WE:
                    break
                os.close(fd)
                fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                continue
            if not asked:
                ask(directory / CONTROL, HandOver(), _HAND_OVER_S)
                asked = True
            elif not successor or time.monotonic() > deadline:
                holder = os.pread(fd, 20, 0).decode()
                raise RefusedError(
                    "managed", f"engine {holder} has this guest ({directory}); outboard release lets it go"
                )
            time.sleep(0.001)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Owner(Enum):
    """Whose a guest's directory is."""

    WE = "we"
    ANOTHER = "another"
    NOBODY = "nobody"


def owner(directory: Path, lock: int) -> Owner:
    """Whose ``directory`` is now, where ``lock`` is what :func:`hold` answered once."""
    try:
        there = (directory / "lock").stat()
    except FileNotFoundError:
        return Owner.NOBODY
    return Owner.WE if os.path.samestat(os.fstat(lock), there) else Owner.ANOTHER


def empty(directory: Path) -> None:
    """Remove what lies in ``directory`` beside its lock."""
    for old in directory.iterdir():
        if old.name != "lock":
            old.unlink()
