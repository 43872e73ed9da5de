"""The agent as a service of systemd's: it says when it is up, and that it is still alive.

Without systemd nothing is said. Engines are not stopped with the agent (``KillMode=process`` in its unit).

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import os
import socket

import uvicorn

from outboard.errors import KernelError

_LOOK_S = 0.02


def notify(state: str) -> None:
    """Tell the service manager, if one has asked to be told.

    :raise KernelError: its socket takes nothing.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        try:
            # "@" stands for the zero byte of the abstract namespace.
            manager.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            raise KernelError(f"message to the service manager at {address}", error.errno or 0) from error


def watchdog_s() -> float | None:
    """How often to say that we are alive: half of what the service manager allows; None when it does not ask."""
    allowed = os.environ.get("WATCHDOG_USEC", "")
    if not allowed.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(allowed) / 2e6


async def accompanied(server: uvicorn.Server) -> None:
    """Run the server, and tell the service manager of its beginning, its life and its end."""

    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(_LOOK_S)
        notify("READY=1")
        pause = watchdog_s()
        while pause is not None:
            notify("WATCHDOG=1")
            await asyncio.sleep(pause)

    telling = asyncio.create_task(tell())
    try:
        await server.serve()
    finally:
        telling.cancel()
        notify("STOPPING=1")
