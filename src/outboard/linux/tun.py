"""TAP devices and the bridges they are put on: linux/if_tun.h, netdevice(7), linux/sockios.h.

A TAP made here is not persistent: it goes when the last descriptor of it is closed.
"""

from __future__ import annotations

import ctypes
import os
import socket

from outboard.errors import KernelError
from outboard.linux.libc import Request, io_request

IFNAMSIZ = 16
IFF_UP = 0x1
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000


class ifreq(ctypes.Structure):
    """struct ifreq, as far as flags and indices go."""

    class _Data(ctypes.Union):
        _fields_ = (("ifr_flags", ctypes.c_short), ("ifr_ifindex", ctypes.c_int), ("_room", ctypes.c_ubyte * 24))

    _anonymous_ = ("data",)
    _fields_ = (("ifr_name", ctypes.c_char * IFNAMSIZ), ("data", _Data))


assert ctypes.sizeof(ifreq) == 40

TUNSETIFF = Request("TUNSETIFF", io_request(1, ord("T"), 202, ctypes.sizeof(ctypes.c_int)), ifreq)
SIOCGIFFLAGS = Request("SIOCGIFFLAGS", 0x8913, ifreq)
SIOCSIFFLAGS = Request("SIOCSIFFLAGS", 0x8914, ifreq)
SIOCBRADDIF = Request("SIOCBRADDIF", 0x89A2, ifreq)


def _request(name: str) -> ifreq:
    encoded = os.fsencode(name)
    if not 0 < len(encoded) < IFNAMSIZ:
        raise ValueError(f"{name!r} is no interface's name: it must have 1 to {IFNAMSIZ - 1} bytes")
    return ifreq(ifr_name=encoded)


def open_tap(name: str) -> int:
    """Make the TAP device ``name`` in the network namespace of the calling thread; its descriptor.

    Frames carry a virtio-net header (IFF_VNET_HDR), which QEMU expects.

    :raise KernelError: EBUSY: there is an interface of that name already; EPERM: needs CAP_NET_ADMIN.
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError("open of /dev/net/tun", error.errno or 0) from error
    request = _request(name)
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        TUNSETIFF(fd, request)
    except KernelError as error:
        os.close(fd)
        raise KernelError(f"TUNSETIFF of {name}", error.errno or 0) from error
    return fd


def set_up(name: str) -> None:
    """Bring an interface up.

    :raise KernelError: ENODEV: there is none of that name.
    """
    request = _request(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        SIOCGIFFLAGS(control.fileno(), request)
        request.ifr_flags |= IFF_UP
        SIOCSIFFLAGS(control.fileno(), request)


def add_to_bridge(bridge: str, name: str) -> None:
    """Make an interface a port of a bridge.

    :raise KernelError: ENODEV: one of the two does not exist, or ``bridge`` is no bridge (EOPNOTSUPP); EBUSY: it is a
        port of another.
    """
    request = _request(bridge)
    try:
        request.ifr_ifindex = socket.if_nametoindex(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            SIOCBRADDIF(control.fileno(), request)
    except OSError as error:
        raise KernelError(f"SIOCBRADDIF of {name} to {bridge}", error.errno or 0) from error
