"""userfaultfd(2), ioctl_userfaultfd(2), <linux/userfaultfd.h>: page faults handled by a process.

The header of an older kernel lacks the newer names; ours go up to read-write protection (UFFD_FEATURE_RWP) and a test
compares whatever the installed header has. What the running kernel can do is asked of it, never guessed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import BinaryIO

from outboard.errors import KernelError
from outboard.linux.libc import Request, S, close, io_request, layout, libc, s64, syscall, u8, u16, u32, u64

SYS_userfaultfd = 323
UFFD_API = 0xAA
USERFAULTFD_IOC_NEW = io_request(0, UFFD_API, 0, 0)
DEVICE = "/dev/userfaultfd"


class Features(IntFlag):
    """UFFD_FEATURE_*."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    """Linux 6.4."""
    POISON = 1 << 14
    """Linux 6.6."""
    WP_ASYNC = 1 << 15
    """Linux 6.7, with PAGEMAP_SCAN."""
    MOVE = 1 << 16
    """Linux 6.8."""
    RWP = 1 << 17
    """2026, memory-management tree."""
    RWP_ASYNC = 1 << 18
    """2026, memory-management tree."""


class Mode(IntFlag):
    """UFFDIO_REGISTER_MODE_*."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class Ioctls(IntFlag):
    """What a registered range takes: ``1 << _UFFDIO_*``."""

    WAKE = 1 << 2
    COPY = 1 << 3
    ZEROPAGE = 1 << 4
    MOVE = 1 << 5
    WRITEPROTECT = 1 << 6
    CONTINUE = 1 << 7
    POISON = 1 << 8
    RWPROTECT = 1 << 9


class FaultFlag(IntFlag):
    """UFFD_PAGEFAULT_FLAG_*."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class EventKind(IntEnum):
    """UFFD_EVENT_*."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


DONTWAKE = 1 << 0
"""Mode of COPY, ZEROPAGE, CONTINUE, POISON and MOVE: leave the faulting thread asleep."""
COPY_WP = 1 << 1
"""Mode of COPY and CONTINUE: map write-protected."""


@layout(24)
class uffdio_api(ctypes.Structure):
    api: u64
    features: u64
    ioctls: u64


@layout(16)
class uffdio_range(ctypes.Structure):
    start: u64
    len: u64


@layout(32)
class uffdio_register(ctypes.Structure):
    start: u64
    len: u64
    mode: u64
    ioctls: u64


@layout(40)
class uffdio_copy(ctypes.Structure):
    """Also struct uffdio_move, whose result has another name."""

    dst: u64
    src: u64
    len: u64
    mode: u64
    copy: s64


@layout(32)
class uffdio_continue(ctypes.Structure):
    """Also struct uffdio_zeropage and uffdio_poison, whose results have other names."""

    start: u64
    len: u64
    mode: u64
    mapped: s64


@layout(24)
class uffdio_writeprotect(ctypes.Structure):
    """Also struct uffdio_rwprotect."""

    start: u64
    len: u64
    mode: u64


@layout(16)
class uffdio_set_mode(ctypes.Structure):
    enable: u64
    disable: u64


@layout(32)
class uffd_msg(ctypes.Structure):
    """struct uffd_msg as its pagefault arm reads."""

    event: u8
    reserved1: u8
    reserved2: u16
    reserved3: u32
    flags: u64
    address: u64
    ptid: u32
    reserved4: u32


def _request(name: str, number: int, argument: type[S], direction: int = 3) -> Request[S]:
    return Request(name, io_request(direction, UFFD_API, number, ctypes.sizeof(argument)), argument)


UFFDIO_API = _request("UFFDIO_API", 0x3F, uffdio_api)
UFFDIO_REGISTER = _request("UFFDIO_REGISTER", 0, uffdio_register)
UFFDIO_UNREGISTER = _request("UFFDIO_UNREGISTER", 1, uffdio_range, 2)
UFFDIO_WAKE = _request("UFFDIO_WAKE", 2, uffdio_range, 2)
UFFDIO_COPY = _request("UFFDIO_COPY", 3, uffdio_copy)
UFFDIO_ZEROPAGE = _request("UFFDIO_ZEROPAGE", 4, uffdio_continue)
UFFDIO_MOVE = _request("UFFDIO_MOVE", 5, uffdio_copy)
UFFDIO_WRITEPROTECT = _request("UFFDIO_WRITEPROTECT", 6, uffdio_writeprotect)
UFFDIO_CONTINUE = _request("UFFDIO_CONTINUE", 7, uffdio_continue)
UFFDIO_POISON = _request("UFFDIO_POISON", 8, uffdio_continue)
UFFDIO_RWPROTECT = _request("UFFDIO_RWPROTECT", 9, uffdio_writeprotect)
UFFDIO_SET_MODE = _request("UFFDIO_SET_MODE", 10, uffdio_set_mode, 1)

_FDINFO = re.compile(r"^API:\s+aa:([0-9a-f]+):", re.MULTILINE)
_ioctl = libc.ioctl
_ANSWERS = (-errno.EEXIST, -errno.EAGAIN, -errno.ENOENT)


_COPY, _MOVE, _ZEROPAGE, _CONTINUE, _POISON = (
    ctypes.c_ulong(request.number)
    for request in (UFFDIO_COPY, UFFDIO_MOVE, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON)
)


def _refusal(request: Request[S], at: int, length: int, done: int) -> int:
    """What a call that failed answers: how far it got, else a refusal that its caller expects; else raise.

    :param done: the struct's result: bytes, or a negated errno where the kernel went so far as to write it.
    """
    answer = done or -ctypes.get_errno()
    if answer > 0 or answer in _ANSWERS:
        return answer
    raise KernelError(f"{request.name} of {length} bytes at {at:#x}", -answer)


def open_device() -> BinaryIO:
    """Open /dev/userfaultfd (Linux 6.1), whose owner needs no capability to make a userfaultfd.

    :raise KernelError: ENOENT: the kernel lacks it; EACCES.
    """
    try:
        return open(DEVICE, "r+b", buffering=0)
    except OSError as error:
        raise KernelError(f"open of {DEVICE}", error.errno or 0) from error


@dataclass(frozen=True, slots=True)
class Fault:
    """A page fault: what for, where (byte address, rounded down to its page), and by which thread if asked for."""

    flags: FaultFlag
    address: int
    thread: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the address space, whose author sleeps until it is read; the words as the kernel lays them out."""

    kind: EventKind
    first: int
    second: int
    third: int


class Userfaultfd:
    """A userfaultfd.

    :param fd: taken over; closed by :meth:`close`.

    Synchronization: requests use one argument struct each, so a process uses an object from one thread; processes that
    share the descriptor by fork have their own.
    """

    def __init__(self, fd: int) -> None:
        # A ctypes object, so that no call has to convert it.
        self._fd = ctypes.c_int(fd)
        self._copy = uffdio_copy()
        self._copy_at = ctypes.c_void_p(ctypes.addressof(self._copy))
        self._continue = uffdio_continue()
        self._continue_at = ctypes.c_void_p(ctypes.addressof(self._continue))

    @classmethod
    def open(cls, flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> Userfaultfd:
        """Make one for this process.

        :raise KernelError: EPERM: needs CAP_SYS_PTRACE, or /dev/userfaultfd.
        """
        try:
            return cls(syscall("userfaultfd", SYS_userfaultfd, flags))
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
        with open_device() as device:
            fd = int(_ioctl(device.fileno(), USERFAULTFD_IOC_NEW, flags))
        if fd < 0:
            raise KernelError("USERFAULTFD_IOC_NEW", ctypes.get_errno())
        return cls(fd)

    def fileno(self) -> int:
        """The descriptor; readable when a fault or an event waits."""
        return self._fd.value

    def close(self) -> None:
        """Close it. Idempotent. The last close of all unregisters what it holds."""
        if self._fd.value >= 0:
            close(self._fd.value)
            self._fd.value = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def api(self, features: Features) -> Features:
        """Agree on the features, once, before anything else; those the kernel enables.

        :raise KernelError: EINVAL: it lacks one of them.
        """
        argument = uffdio_api(api=UFFD_API, features=features)
        UFFDIO_API(self._fd.value, argument)
        return Features(argument.features)

    def enabled(self) -> Features:
        """The features that :meth:`api` agreed on, whoever called it. Source: /proc/self/fdinfo.

        :raise KernelError: EBADF: this is no userfaultfd.
        """
        text = Path(f"/proc/self/fdinfo/{self._fd.value}").read_text() if self._fd.value >= 0 else ""
        match = _FDINFO.search(text)
        if match is None:
            raise KernelError(f"userfaultfd's line in fdinfo of descriptor {self._fd.value}", errno.EBADF)
        # The kernel keeps a bit of its own there: that there was an agreement.
        return Features(int(match[1], 16) & sum(Features))

    def register(self, start: int, length: int, mode: Mode) -> Ioctls:
        """Watch ``[start, start + length)`` of the address space; what can be asked of it.

        :raise KernelError: EBUSY: another userfaultfd has it; EINVAL: the mapping cannot do that mode.
        """
        argument = uffdio_register(start=start, len=length, mode=mode)
        UFFDIO_REGISTER(self._fd.value, argument)
        return Ioctls(argument.ioctls)

    def unregister(self, start: int, length: int) -> None:
        """Stop watching; whoever waits for a page there is woken."""
        UFFDIO_UNREGISTER(self._fd.value, uffdio_range(start=start, len=length))

    def wake(self, start: int, length: int) -> None:
        """Let threads that wait for pages there look again."""
        UFFDIO_WAKE(self._fd.value, uffdio_range(start=start, len=length))

    def copy(self, dst: int, src: int, length: int, mode: int = 0) -> int:
        """Place a copy of ``[src, src + length)`` of this process at ``dst``, where it is absent.

        :return: bytes placed, which may be fewer; or -EEXIST (the first page is present), -EAGAIN (the address space is
            changing, try again), -ENOENT (nothing is mapped or registered there).
        :raise KernelError: anything else; ESRCH when the process has ended.
        """
        argument = self._copy
        argument.dst, argument.src, argument.len, argument.mode, argument.copy = dst, src, length, mode, 0
        if _ioctl(self._fd, _COPY, self._copy_at):
            return _refusal(UFFDIO_COPY, dst, length, argument.copy)
        return argument.copy

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> int:
        """Move pages inside the address space (Linux 6.8, anonymous memory); answers as :meth:`copy`."""
        argument = self._copy
        argument.dst, argument.src, argument.len, argument.mode, argument.copy = dst, src, length, mode, 0
        if _ioctl(self._fd, _MOVE, self._copy_at):
            return _refusal(UFFDIO_MOVE, dst, length, argument.copy)
        return argument.copy

    def zeropage(self, start: int, length: int, mode: int = 0) -> int:
        """Place pages of zeros where they are absent; answers as :meth:`copy`."""
        argument = self._continue
        argument.start, argument.len, argument.mode, argument.mapped = start, length, mode, 0
        if _ioctl(self._fd, _ZEROPAGE, self._continue_at):
            return _refusal(UFFDIO_ZEROPAGE, start, length, argument.mapped)
        return argument.mapped

    def continue_(self, start: int, length: int, mode: int = 0) -> int:
        """Map pages that the file holds already (after a minor fault); answers as :meth:`copy`.

        :raise KernelError: as :meth:`copy`; EFAULT: the file does not hold the first of them.
        """
        argument = self._continue
        argument.start, argument.len, argument.mode, argument.mapped = start, length, mode, 0
        if _ioctl(self._fd, _CONTINUE, self._continue_at):
            return _refusal(UFFDIO_CONTINUE, start, length, argument.mapped)
        return argument.mapped

    def poison(self, start: int, length: int, mode: int = 0) -> int:
        """Make accesses to absent pages a memory error, SIGBUS (Linux 6.6); answers as :meth:`copy`."""
        argument = self._continue
        argument.start, argument.len, argument.mode, argument.mapped = start, length, mode, 0
        if _ioctl(self._fd, _POISON, self._continue_at):
            return _refusal(UFFDIO_POISON, start, length, argument.mapped)
        return argument.mapped

    def write_protect(self, start: int, length: int, protect: bool = True, dont_wake: bool = False) -> None:
        """Write-protect a range, or lift that and (unless ``dont_wake``) wake whoever waits to write."""
        mode = int(protect) | int(dont_wake) << 1
        UFFDIO_WRITEPROTECT(self._fd.value, uffdio_writeprotect(start=start, len=length, mode=mode))

    def rwprotect(self, start: int, length: int, protect: bool = True, dont_wake: bool = False) -> None:
        """Protect a range from reads and writes, or lift that (kernels with UFFD_FEATURE_RWP)."""
        mode = int(protect) | int(dont_wake) << 1
        UFFDIO_RWPROTECT(self._fd.value, uffdio_writeprotect(start=start, len=length, mode=mode))

    def set_mode(self, enable: Features, disable: Features = Features(0)) -> None:  # noqa: B008  # an immutable flag
        """Switch synchronous and asynchronous notification of protected ranges (kernels with UFFD_FEATURE_RWP)."""
        UFFDIO_SET_MODE(self._fd.value, uffdio_set_mode(enable=enable, disable=disable))

    def read_into(self, buffer: bytearray) -> int:
        """Read messages of 32 bytes each into ``buffer``; how many. None waiting is 0. The hot path.

        :raise KernelError: the read failed.
        """
        try:
            return os.readv(self._fd.value, [buffer]) // 32
        except BlockingIOError:
            return 0
        except OSError as error:
            raise KernelError("read of a userfaultfd", error.errno or 0) from error

    def read(self) -> list[Fault | Event]:
        """The messages that wait, at most 32; empty when none does."""
        buffer = bytearray(32 * ctypes.sizeof(uffd_msg))
        found: list[Fault | Event] = []
        for index in range(self.read_into(buffer)):
            message = uffd_msg.from_buffer(buffer, index * ctypes.sizeof(uffd_msg))
            if message.event == EventKind.PAGEFAULT:
                found.append(Fault(FaultFlag(message.flags), message.address, message.ptid))
            else:
                third = message.ptid | message.reserved4 << 32
                found.append(Event(EventKind(message.event), message.flags, message.address, third))
        return found


def available_features() -> Features:
    """What this kernel offers, asked with a throw-away userfaultfd."""
    with Userfaultfd.open() as probe:
        return probe.api(Features(0))
