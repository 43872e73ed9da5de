"""syscall(2) and ioctl(2) through libc, with errno as an exception and the GIL released meanwhile.

``fcntl.ioctl`` throws away what the kernel wrote into the argument when a call fails, and userfaultfd says there how
far it got; so libc's own ioctl is called.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Generic, TypeVar

from outboard.errors import KernelError

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ioctl.restype = ctypes.c_int
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

S = TypeVar("S", bound=ctypes.Structure)


def syscall(operation: str, number: int, *arguments: int) -> int:
    """Make a system call.

    :param operation: how the call reads in an error.
    :raise KernelError: it failed.
    """
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)))
    if result < 0:
        raise KernelError(operation, ctypes.get_errno())
    return result


class Request(Generic[S]):
    """An ioctl request: its name, its number and the struct it takes."""

    __slots__ = ("argument", "name", "number")

    def __init__(self, name: str, number: int, argument: type[S]) -> None:
        self.name = name
        self.number = number
        self.argument = argument

    def __call__(self, fd: int, argument: S) -> int:
        """Make the request.

        :raise KernelError: it failed; ``argument`` holds what the kernel wrote.
        """
        result = int(libc.ioctl(fd, self.number, ctypes.byref(argument)))
        if result < 0:
            raise KernelError(self.name, ctypes.get_errno())
        return result

    def attempt(self, fd: int, address: int) -> int:
        """Make the request on a struct at ``address``: the hot path. 0, or a negated errno; no exception."""
        if libc.ioctl(fd, self.number, address) < 0:
            return -ctypes.get_errno()
        return 0


def io_request(direction: int, kind: int, number: int, size: int) -> int:
    """A request number as asm-generic/ioctl.h makes it; ``direction`` is 1 to write, 2 to read, 3 for both."""
    return direction << 30 | size << 16 | kind << 8 | number


def close(fd: int) -> None:
    """close(2), forgiving a descriptor that is closed already."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
