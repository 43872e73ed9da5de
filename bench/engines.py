"""The real engine for a process of ours, as the agent's engines are for a VM."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from outboard.agent.manager import Manager
from outboard.agent.swapping import Swapping
from outboard.vmm.process import attach_process


def engine(directory: str, pid: int, ready: Connection, swap: bytes = b"") -> None:
    """Be the engine of the process ``pid``; tell over ``ready`` once it serves.

    :param swap: where its pages go, as JSON; a plain file in ``directory`` when not given.
    """
    place = msgspec.json.decode(swap, type=Swapping) if swap else Path(directory) / "swap"
    manager = Manager(Path(directory) / "memory", partial(attach_process, pid), place)
    ready.send_bytes(b"r")
    manager.serve()
