"""Cutting the streams of an engine, as a network does that drops a connection."""

from __future__ import annotations

import contextlib
import socket

from outboard.errors import KernelError
from outboard.linux import pidfd, proc


def cut(engine: int) -> int:
    """Shut down every TCP connection of process ``engine``, whoever else has it open; how many there were."""
    cuts = 0
    process = pidfd.open(engine)
    try:
        for number, link in proc.descriptors(engine).items():
            if not link.startswith("socket:"):
                continue
            with contextlib.suppress(KernelError), socket.socket(fileno=pidfd.getfd(process, number)) as connection:
                if connection.family == socket.AF_INET and connection.type == socket.SOCK_STREAM:
                    # One that listens, or is cut already, is not connected.
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                        cuts += 1
    finally:
        pidfd.close(process)
    return cuts
