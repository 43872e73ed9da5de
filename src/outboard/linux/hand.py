"""A hand inside another process: a thread of ours in it that makes the system calls it is told, thousands at a time.

clone(2), ptrace(2), unix(7). It is made by stopping one thread of the process for an instant; afterwards nobody is
stopped any more. Unlike a thread that is stopped for a batch, it comes to no harm when we are killed: it finishes what
it has begun, closes the descriptors that it was given, and ends. What it leaves then is its code and its table, a
private mapping of a memfd, by whose name a successor finds and removes it.

The thread waits in read(2) on a socket whose other end is ours. It uses no C library, no stack and no signal: all are
blocked in it. Orders and results lie in a table in the process's memory that we write through /proc/PID/mem::

    0x0000  the code
    0x1000  calls in the order, calls at the end; 0x1040 a struct msghdr, 0x1100 the thread's name
    0x1800  the calls to make at the end, 64 bytes each: number, six arguments, result
    0x2000  the calls of the order
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import pidfd, proc
from outboard.linux.ptrace import CONTROL, MESSAGE, Stopped, SYS_close, SYS_mmap, SYS_munmap, SYS_recvmsg

SYS_memfd_create = 319
_SYS_getpid, _SYS_socketpair, _SYS_ftruncate = 39, 53, 77
_NAME = b"outboard-hand"
_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000
"""CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD, _SYSVSEM."""
_CODE = bytes.fromhex(
    "0f05"  # syscall: clone
    "85c0"  # test eax, eax
    "7401"  # jz child
    "cc"  # int3
    "b89d000000"  # child: mov eax, SYS_prctl
    "bf0f000000"  # mov edi, PR_SET_NAME
    "488db300110000"  # lea rsi, [rbx + 0x1100]
    "0f05"  # syscall
    "31c0"  # again: xor eax, eax (SYS_read)
    "4489f7"  # mov edi, r14d
    "488db300100000"  # lea rsi, [rbx + 0x1000]
    "ba08000000"  # mov edx, 8
    "0f05"  # syscall
    "4531ff"  # xor r15d, r15d
    "4c8bab00100000"  # mov r13, [rbx + 0x1000]
    "4c8da300200000"  # lea r12, [rbx + 0x2000]
    "4883f808"  # cmp rax, 8
    "7411"  # je rows
    "41ffc7"  # inc r15d: nobody is there any more
    "4c8bab08100000"  # mov r13, [rbx + 0x1008]
    "4c8da300180000"  # lea r12, [rbx + 0x1800]
    "4d85ed"  # rows: test r13, r13
    "7432"  # jz ended
    "498b0424"  # mov rax, [r12]
    "498b7c2408"  # mov rdi, [r12 + 8]
    "498b742410"  # mov rsi, [r12 + 16]
    "498b542418"  # mov rdx, [r12 + 24]
    "4d8b542420"  # mov r10, [r12 + 32]
    "4d8b442428"  # mov r8, [r12 + 40]
    "4d8b4c2430"  # mov r9, [r12 + 48]
    "0f05"  # syscall
    "4989442438"  # mov [r12 + 56], rax
    "4983c440"  # add r12, 64
    "49ffcd"  # dec r13
    "ebc9"  # jmp rows
    "4585ff"  # ended: test r15d, r15d
    "7527"  # jnz leave
    "b82c000000"  # mov eax, SYS_sendto
    "4489f7"  # mov edi, r14d
    "488db300100000"  # lea rsi, [rbx + 0x1000]
    "ba08000000"  # mov edx, 8
    "41ba00400000"  # mov r10d, MSG_NOSIGNAL
    "4531c0"  # xor r8d, r8d
    "4531c9"  # xor r9d, r9d
    "0f05"  # syscall
    "e962ffffff"  # jmp again
    "b83c000000"  # leave: mov eax, SYS_exit
    "31ff"  # xor edi, edi
    "0f05"  # syscall
)
_CLONE = 7
"""Bytes of the code up to the child's."""
_COUNTS, _MESSAGE, _VECTOR, _CONTROL, _DATA, _NAMED = 0x1000, 0x1040, 0x1080, 0x10A0, 0x10E0, 0x1100
_LAST, _TABLE = 0x1800, 0x2000
_ROW = 64
_MOST_LAST = (_TABLE - _LAST) // _ROW
MOST = 1024
"""Calls of one order."""
_SIZE = _TABLE + MOST * _ROW
_READ_WRITE_EXEC, _PRIVATE, _PRIVATE_ANONYMOUS = 7, 0x2, 0x22
_END_S = 10.0


class Hand:
    """A thread of ours in process ``pid``, which has none yet; :meth:`await_none` before, if one may be left.

    :param tid: the thread to stop while it is made, never a vCPU's.
    :raise KernelError: EPERM: needs CAP_SYS_PTRACE, or a seccomp filter refuses a call; EAGAIN: no more threads.

    Synchronization: one thread uses it.
    """

    def __init__(self, pid: int, tid: int | None = None) -> None:
        self._pid, self._tid = pid, tid
        self._last: list[tuple[int, ...]] = []
        self._socket: socket.socket | None = None
        self._memory = -1
        try:
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"open of /proc/{pid}/mem", error.errno or 0) from error
        try:
            self._make()
            self.at_end(SYS_close, self._theirs)
            # Once it has answered, its name is there to be found.
            self.call("getpid", _SYS_getpid)
            left = [one for one in _rooms(pid) if one.start != self._room]
            self.batch(
                np.array([[SYS_munmap, one.start, _SIZE, 0, 0, 0, 0] for one in left], dtype=np.int64).reshape(-1, 7)
            )
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        process = pidfd.open(self._pid)
        try:
            with Stopped(self._pid, self._tid) as target:
                scratch = target.syscall("mmap", SYS_mmap, 0, 4096, 3, _PRIVATE_ANONYMOUS, -1, 0)
                self._poke(scratch, _NAME + b"\0")
                file = target.syscall("memfd_create", SYS_memfd_create, scratch, 1)
                target.syscall("ftruncate", _SYS_ftruncate, file, _SIZE)
                self._room = target.syscall("mmap", SYS_mmap, 0, _SIZE, _READ_WRITE_EXEC, _PRIVATE, file, 0)
                target.syscall("close", SYS_close, file)
                kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
                target.syscall("socketpair", _SYS_socketpair, socket.AF_UNIX, kind, 0, scratch)
                ours, self._theirs = struct.unpack("<2i", self._peek(scratch, 8))
                self._socket = socket.socket(fileno=pidfd.getfd(process, ours))
                target.syscall("close", SYS_close, ours)
                target.syscall("munmap", SYS_munmap, scratch, 4096)
                self._poke(self._room, _CODE)
                self._poke(self._room + _NAMED, _NAME + b"\0")
                self._number = target.spawn(self._room, _CLONE, _FLAGS, self._room, self._theirs)
        finally:
            pidfd.close(process)

    def _poke(self, address: int, data: bytes) -> None:
        try:
            if os.pwrite(self._memory, data, address) != len(data):
                raise KernelError(f"write at {address:#x} of process {self._pid}", errno.ESRCH)
        except OSError as error:
            raise KernelError(f"write at {address:#x} of process {self._pid}", error.errno or 0) from error

    def _peek(self, address: int, length: int) -> bytes:
        try:
            raw = os.pread(self._memory, length, address)
        except OSError as error:
            raise KernelError(f"read at {address:#x} of process {self._pid}", error.errno or 0) from error
        if len(raw) != length:
            raise KernelError(f"read at {address:#x} of process {self._pid}", errno.ESRCH)
        return raw

    def batch(self, calls: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make system calls there.

        :param calls: shape (n, 7): number and six arguments of each.
        :return: shape (n,): each result, negated errno where it failed.
        :raise KernelError: ESRCH: the process has ended.
        """
        results = [self._order(calls[at : at + MOST]) for at in range(0, len(calls), MOST)]
        return np.concatenate(results) if results else np.empty(0, dtype=np.int64)

    def _order(self, calls: NDArray[np.int64]) -> NDArray[np.int64]:
        self._channel()
        table: NDArray[np.int64] = np.zeros((len(calls), _ROW // 8), dtype=np.int64)
        table[:, :7] = calls
        self._poke(self._room + _TABLE, table.tobytes())
        self._tell(struct.pack("<Q", len(calls)))
        self._await_answer()
        raw = self._peek(self._room + _TABLE, table.nbytes)
        return np.frombuffer(raw, dtype=np.int64).reshape(len(calls), -1)[:, 7].copy()

    def _channel(self) -> socket.socket:
        if self._socket is None:
            raise ValueError(f"the hand in process {self._pid} is closed")
        return self._socket

    def _tell(self, data: bytes) -> None:
        try:
            self._channel().send(data)
        except OSError as error:
            raise KernelError(f"order to the hand in process {self._pid}", errno.ESRCH) from error

    def _await_answer(self) -> None:
        if not self._channel().recv(8):
            raise KernelError(f"answer of the hand in process {self._pid}, which ended", errno.ESRCH)

    def call(self, operation: str, number: int, *arguments: int) -> int:
        """Make one system call there.

        :raise KernelError: it failed; ESRCH: the process has ended.
        """
        row: NDArray[np.int64] = np.zeros((1, 7), dtype=np.int64)
        row[0, : 1 + len(arguments)] = (number, *arguments)
        result = int(self._order(row)[0])
        if result < 0:
            raise KernelError(f"{operation} in process {self._pid}", -result)
        return result

    def give(self, fd: int) -> int:
        """Give the process a duplicate of our descriptor ``fd``; its number there, until the hand ends.

        :raise KernelError: EMFILE: it has no room for more; ESRCH.
        """
        room = self._room
        message = MESSAGE.pack(0, 0, room + _VECTOR, 1, room + _CONTROL, CONTROL.size, 0, room + _DATA, 1)
        self._poke(room + _MESSAGE, message[:56])
        self._poke(room + _VECTOR, message[56:])
        row = [[SYS_recvmsg, self._theirs, room + _MESSAGE, socket.MSG_CMSG_CLOEXEC, 0, 0, 0, 0]]
        self._poke(room + _TABLE, np.array(row, dtype=np.int64).tobytes())
        self._poke(room + _CONTROL, bytes(CONTROL.size))
        self._tell(struct.pack("<Q", 1))
        socket.send_fds(self._channel(), [b"\0"], [fd])
        self._await_answer()
        length, _, _, number = CONTROL.unpack(self._peek(room + _CONTROL, CONTROL.size))
        # Where there is no room for it, the message comes without the descriptor.
        if length == 0 or number <= 0:
            raise KernelError(f"handing a descriptor to process {self._pid}", errno.EMFILE)
        self.at_end(SYS_close, number)
        return int(number)

    def at_end(self, *call: int) -> None:
        """Have the thread make one more system call when it ends, also if that is because we were killed.

        :raise KernelError: E2BIG: there are too many; ESRCH: the process has ended.
        """
        if len(self._last) == _MOST_LAST:
            raise KernelError(f"more than {_MOST_LAST} calls at the end of a hand in process {self._pid}", errno.E2BIG)
        self._last.append(call)
        rows: NDArray[np.int64] = np.zeros((len(self._last), _ROW // 8), dtype=np.int64)
        for row, one in zip(rows, self._last, strict=True):
            row[: len(one)] = one
        self._poke(self._room + _LAST, rows.tobytes())
        self._poke(self._room + _COUNTS + 8, struct.pack("<Q", len(rows)))

    def close(self) -> None:
        """End the thread, close what it was given, and remove what it ran in. Idempotent.

        :raise KernelError: the process would not be stopped for that; an ended one is no error.
        """
        if self._memory < 0:
            return
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        os.close(self._memory)
        self._memory = -1
        try:
            await_none(self._pid, lambda: None)
            with Stopped(self._pid, self._tid) as target:
                for one in _rooms(self._pid):
                    target.syscall("munmap", SYS_munmap, one.start, one.end - one.start)
        except KernelError:
            if pidfd.alive(self._pid):
                raise


def _rooms(pid: int) -> list[proc.Mapping]:
    """The mappings of hands in process ``pid``, living or left."""
    name = f"/memfd:{_NAME.decode()}"
    return [one for one in proc.maps(pid) if one.path.startswith(name) and "x" in one.permissions]


def await_none(pid: int, meanwhile: Callable[[], object]) -> None:
    """Wait until no hand of anybody's is in process ``pid``: one whose owner has died finishes its order.

    :param meanwhile: called again and again: what it may wait for, such as the reading of events.
    :raise KernelError: EBUSY: there is one whose owner lives; ESRCH, ENOENT: the process has ended.
    """
    deadline = time.monotonic() + _END_S
    while any(thread.name == _NAME.decode() for thread in proc.threads(pid)):
        if time.monotonic() > deadline:
            raise KernelError(f"wait for the end of another hand in process {pid}", errno.EBUSY)
        meanwhile()
        select.select([], [], [], 0.0005)
