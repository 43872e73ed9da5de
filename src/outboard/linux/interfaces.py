"""netdevice(7), Linux Documentation/ABI/testing/sysfs-class-net: the interface that leads somewhere, and its speed."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

from outboard.errors import KernelError

SIOCGIFADDR = 0x8915
_NET = Path("/sys/class/net")


def towards(address: str) -> str | None:
    """The interface by which packets to an IPv4 address leave; None: it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            # Nothing is sent: the kernel only chooses a route.
            asking.connect((address, 9))
            ours = asking.getsockname()[0]
        except OSError:
            return None
        return next((name for _, name in socket.if_nameindex() if _address(asking, name) == ours), None)


def _address(asking: socket.socket, name: str) -> str | None:
    try:
        answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("40s", name.encode()))
    except OSError:
        # It has none.
        return None
    return socket.inet_ntoa(answer[20:24])


def speed(name: str) -> int | None:
    """Of an interface in bit/s; None where it has no such thing, or no link.

    :raise KernelError: there is no such interface.
    """
    try:
        megabits = int((_NET / name / "speed").read_text())
    except FileNotFoundError as error:
        raise KernelError(f"read of the speed of {name}", error.errno or 0) from error
    except OSError:
        return None
    return megabits * 1_000_000 if megabits > 0 else None
