"""syscall(2) and ioctl(2) through libc, with errno as an exception and the GIL released meanwhile.

``fcntl.ioctl`` throws away what the kernel wrote into the argument when a call fails, and userfaultfd says there how
far it got; so libc's own ioctl is called.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Annotated, Generic, TypeVar, get_type_hints

from outboard.errors import KernelError

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.ioctl.restype = ctypes.c_int
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

u8 = Annotated[int, ctypes.c_uint8]
u16 = Annotated[int, ctypes.c_uint16]
u32 = Annotated[int, ctypes.c_uint32]
u64 = Annotated[int, ctypes.c_uint64]
s64 = Annotated[int, ctypes.c_int64]

S = TypeVar("S", bound=ctypes.Structure)


def layout(size: int) -> Callable[[type[S]], type[S]]:
    """Lay a struct out as its annotations say: u8 to s64, in C's order and alignment.

    :param size: what the kernel's struct measures, in bytes; one that comes out otherwise is an ImportError.
    """

    def lay(struct: type[S]) -> type[S]:
        hints = get_type_hints(struct, include_extras=True)
        struct._fields_ = [(name, hints[name].__metadata__[0]) for name in struct.__annotations__]
        if ctypes.sizeof(struct) != size:
            raise ImportError(f"struct {struct.__name__} is {ctypes.sizeof(struct)} bytes, the kernel's is {size}")
        return struct

    return lay


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


def io_request(direction: int, kind: int, number: int, size: int) -> int:
    """A request number as asm-generic/ioctl.h makes it; ``direction``: 0 no argument, 1 _IOW, 2 _IOR, 3 both."""
    return direction << 30 | size << 16 | kind << 8 | number


def close(fd: int) -> None:
    """close(2), forgiving a descriptor that is closed already."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
