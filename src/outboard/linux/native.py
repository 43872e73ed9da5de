"""read(2), write(2), poll(2), ioctl(2), pread(2), lseek(2), posix_fadvise(2), others, for loops numba compiles.

A compiled loop calls libc without the interpreter and without the GIL, which is what the fault path and batches of
scattered pages need. Each function takes plain numbers, addresses included, and answers as the kernel does: a result,
or a negated errno. Loops over them live with whoever owns the loop.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit, types  # type: ignore[attr-defined]  # numba re-exports carray

from outboard.linux.process_madvise import SYS_process_madvise


def _libc(name: str, result: Any, *arguments: Any) -> Any:
    """A function of libc's, which the compiler finds by its name and may keep in its cache by that."""
    return types.ExternalFunction(name, result(*arguments))


_errno = _libc("__errno_location", types.CPointer(types.int32))  # type: ignore[no-untyped-call]
_read = _libc("read", types.int64, types.int32, types.uintp, types.uint64)
_write = _libc("write", types.int64, types.int32, types.uintp, types.uint64)
_poll = _libc("poll", types.int32, types.uintp, types.uint64, types.int32)
_ioctl = _libc("ioctl", types.int32, types.int32, types.uint64, types.uintp)
_pread = _libc("pread", types.int64, types.int32, types.uintp, types.uint64, types.int64)
_pwrite = _libc("pwrite", types.int64, types.int32, types.uintp, types.uint64, types.int64)
_lseek = _libc("lseek", types.int64, types.int32, types.int64, types.int32)
_fallocate = _libc("fallocate", types.int32, types.int32, types.int32, types.int64, types.int64)
_posix_fadvise = _libc("posix_fadvise", types.int32, types.int32, types.int64, types.int64, types.int32)
_clock_gettime = _libc("clock_gettime", types.int32, types.int32, types.uintp)
_ppoll = _libc("ppoll", types.int32, types.uintp, types.uint64, types.uintp, types.uintp)
# The C library of Debian 12 has no function of its own for it.
_syscall = _libc("syscall", types.int64, types.int64, types.int64, types.uintp, types.uint64, types.int64, types.uint64)

_CLOCK_MONOTONIC = 1
POSIX_FADV_WILLNEED = 3


@njit(inline="always")
def _answer(result: int) -> int:
    return -carray(_errno(), 1)[0] if result < 0 else result


@njit("int64(int32, uintp, uint64)", cache=True, nogil=True)
def read(fd: int, address: int, length: int) -> int:
    """Read up to ``length`` bytes to ``address``; how many."""
    return _answer(_read(fd, address, length))


@njit("int64(int32, uintp, uint64)", cache=True, nogil=True)
def write(fd: int, address: int, length: int) -> int:
    """Write up to ``length`` bytes from ``address``; how many."""
    return _answer(_write(fd, address, length))


@njit("int64(uintp, uint64, int32)", cache=True, nogil=True)
def poll(address: int, count: int, timeout_ms: int) -> int:
    """Wait for one of the ``count`` struct pollfd at ``address``; how many are ready."""
    return _answer(_poll(address, count, timeout_ms))


@njit("int64(uintp, uint64, int64, int64[::1])", cache=True, nogil=True)
def ppoll(address: int, count: int, timeout_ns: int, room: Any) -> int:
    """:func:`poll` with a timeout in nanoseconds; ``room`` is two int64 for a struct timespec."""
    room[0], room[1] = timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000
    return _answer(_ppoll(address, count, room.ctypes.data, 0))


@njit("int64(int32, uint64, uintp)", cache=True, nogil=True)
def ioctl(fd: int, request: int, address: int) -> int:
    """Make a request whose argument lies at ``address``."""
    return _answer(_ioctl(fd, request, address))


@njit("int64(int32, uintp, uint64, int64)", cache=True, nogil=True)
def pread(fd: int, address: int, length: int, offset: int) -> int:
    """Read from ``offset`` of a file to ``address``; how many bytes."""
    return _answer(_pread(fd, address, length, offset))


@njit("int64(int32, uintp, uint64, int64)", cache=True, nogil=True)
def pwrite(fd: int, address: int, length: int, offset: int) -> int:
    """Write from ``address`` to ``offset`` of a file; how many bytes."""
    return _answer(_pwrite(fd, address, length, offset))


@njit("int64(int32, int64, int32)", cache=True, nogil=True)
def lseek(fd: int, offset: int, whence: int) -> int:
    """Where a file has data or a hole from ``offset`` on, as ``whence`` asks."""
    return _answer(_lseek(fd, offset, whence))


@njit("int64(int32, int32, int64, int64)", cache=True, nogil=True)
def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Take or give back a file's blocks."""
    return _answer(_fallocate(fd, mode, offset, length))


@njit("int64(int32, int64, int64, int32)", cache=True, nogil=True)
def posix_fadvise(fd: int, offset: int, length: int, advice: int) -> int:
    """Say what is about to be done with a part of a file."""
    # Of its own accord it answers with an errno.
    return -_posix_fadvise(fd, offset, length, advice)  # type: ignore[no-any-return]


@njit("int64(int32, int64[::1])", cache=True, nogil=True)
def clock_ns(clock: int, room: Any) -> int:
    """What a clock shows, in nanoseconds; ``room`` is two int64 for a struct timespec."""
    answer = _answer(_clock_gettime(clock, room.ctypes.data))
    return answer if answer < 0 else room[0] * 1_000_000_000 + room[1]


@njit("int64(int64[::1])", cache=True, nogil=True)
def monotonic_ns(room: Any) -> int:
    """CLOCK_MONOTONIC in nanoseconds; ``room`` is two int64 for a struct timespec."""
    _clock_gettime(_CLOCK_MONOTONIC, room.ctypes.data)
    return room[0] * 1_000_000_000 + room[1]  # type: ignore[no-any-return]


@njit("int64(int32, uintp, uint64, int32)", cache=True, nogil=True)
def process_madvise(pidfd: int, address: int, count: int, advice: int) -> int:
    """Advise on the ``count`` struct iovec at ``address``; how many bytes were advised on."""
    return _answer(_syscall(SYS_process_madvise, pidfd, address, count, advice, 0))
