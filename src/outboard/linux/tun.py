"""TAP devices and the bridges they are put on: linux/if_tun.h, netdevice(7), linux/sockios.h.

A TAP made here is not persistent: it goes when the last descriptor of it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from outboard.errors import KernelError

IFNAMSIZ = 16
IFF_UP = 0x1
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

# These take a struct ifreq whatever their numbers say, and leave nothing in it when they fail.
TUNSETIFF = 0x400454CA
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCBRADDIF = 0x89A2

_IFREQ_FLAGS = struct.Struct(f"{IFNAMSIZ}sh22x")
_IFREQ_INDEX = struct.Struct(f"{IFNAMSIZ}si20x")


def _name(name: str) -> bytes:
    encoded = os.fsencode(name)
    if not 0 < len(encoded) < IFNAMSIZ:
        raise ValueError(f"{name!r} is no interface's name: it must have 1 to {IFNAMSIZ - 1} bytes")
    return encoded


def open_tap(name: str) -> int:
    """Make the TAP device ``name`` in the network namespace of the calling thread; its descriptor.

    Frames carry a virtio-net header (IFF_VNET_HDR), which QEMU expects.

    :raise KernelError: EBUSY: there is an interface of that name already; EPERM: needs CAP_NET_ADMIN.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError("open of /dev/net/tun", error.errno or 0) from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ_FLAGS.pack(_name(name), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError as error:
        os.close(fd)
        raise KernelError(f"TUNSETIFF of {name}", error.errno or 0) from error
    return fd


def set_up(name: str) -> None:
    """Bring an interface up.

    :raise KernelError: ENODEV: there is none of that name.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            answer = fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ_FLAGS.pack(_name(name), 0))
            _, flags = _IFREQ_FLAGS.unpack(answer)
            fcntl.ioctl(control, SIOCSIFFLAGS, _IFREQ_FLAGS.pack(_name(name), flags | IFF_UP))
    except OSError as error:
        raise KernelError(f"SIOCSIFFLAGS of {name}", error.errno or 0) from error


def add_to_bridge(bridge: str, name: str) -> None:
    """Make an interface a port of a bridge.

    :raise KernelError: ENODEV: one of the two does not exist; EOPNOTSUPP: ``bridge`` is no bridge; EBUSY: ``name`` is a
        port of another.
    """
    try:
        index = socket.if_nametoindex(name)
    except OSError as error:
        # It keeps the errno to itself.
        raise KernelError(f"if_nametoindex of {name}", errno.ENODEV) from error
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, SIOCBRADDIF, _IFREQ_INDEX.pack(_name(bridge), index))
    except OSError as error:
        raise KernelError(f"SIOCBRADDIF of {name} to {bridge}", error.errno or 0) from error
