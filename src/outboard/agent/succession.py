"""How an engine's successor finds its work: a directory with a lock that ends with its holder, and the task.

The directory is the VM's, on tmpfs. An engine that has done its work removes it; one that has died leaves it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from outboard.errors import RefusedError

_LOCK, _TASK = "lock", "task.json"

T = TypeVar("T")


def only_one(journal: Path, *, wait: bool = False) -> int:
    """Be the one engine that is at work in ``journal``: a descriptor that holds the lock until it is closed.

    :param wait: until whoever is at work there has ended.
    :raise RefusedError: ``taken``: an engine is at work.
    """
    fd = os.open(journal / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        raise RefusedError("taken", f"an engine is at work in {journal}") from None
    return fd


def keep_task(journal: Path, task: msgspec.Struct) -> None:
    """Leave to a successor what is to be done."""
    fresh = journal / f"{_TASK}.new"
    fresh.write_bytes(msgspec.json.encode(task))
    fresh.rename(journal / _TASK)


def left_task(journal: Path, kind: type[T]) -> T | None:
    """What an engine has left to do; None when there is nothing, or it has not come that far."""
    try:
        return msgspec.json.decode((journal / _TASK).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
