"""The real engine for a process of ours, as the agent's engines are for a VM."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from outboard.agent.manager import Manager
from outboard.vmm.process import attach_process


def engine(directory: str, pid: int, ready: Connection) -> None:
    """Be the engine of the process ``pid``; tell over ``ready`` once it serves."""
    manager = Manager(Path(directory) / "memory", partial(attach_process, pid), Path(directory) / "swap")
    ready.send_bytes(b"r")
    manager.serve()
