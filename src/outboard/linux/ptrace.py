"""ptrace(2): system calls made by another process, one thread of it stopped for microseconds.

The thread is seized, not attached, so that it gets no signal; it is put at a ``syscall`` instruction that is mapped in
it anyway (libc, the vdso), stepped over it, and put back exactly. Signals that come meanwhile are delivered to it
afterwards. For thousands of calls a stub is written into the target once, which makes them all in one stop.

Choose a thread that may wait a little: never a vCPU.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import pidfd, proc
from outboard.linux.libc import libc
from outboard.linux.userfaultfd import SYS_userfaultfd

PTRACE_CONT = 7
PTRACE_SINGLESTEP = 9
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
_WALL = 0x40000000
_EVENT_STOP = 128

SYS_close = 3
SYS_mmap = 9
SYS_munmap = 11

libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_SYSCALL = b"\x0f\x05"


_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class user_regs_struct(ctypes.Structure):
    """<sys/user.h>, x86-64."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in _REGISTERS)


_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")

_STUB = bytes.fromhex(
    "498b0424"  # again: mov rax, [r12]
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
    "75ce"  # jnz again
    "cc"  # int3
)
_ROW = 8
"""Words of one call in the stub's table: number, six arguments, result."""


def _ptrace(operation: str, request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if libc.ptrace(request, tid, address, data) < 0:
        raise KernelError(f"ptrace({operation}) of thread {tid}", ctypes.get_errno())


@lru_cache(maxsize=256)
def _syscall_instruction(pid: int, _started: int) -> int:
    for mapping in proc.maps(pid):
        if "x" in mapping.permissions and ("libc" in mapping.path or "[vdso]" in mapping.path):
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(mapping.start)
                at = (memory.read(mapping.end - mapping.start) or b"").find(_SYSCALL)
            if at >= 0:
                return mapping.start + at
    raise KernelError(f"search for a syscall instruction in process {pid}", errno.ENOENT)


class Stopped:
    """One thread of a process, stopped; a context manager.

    :param tid: which thread; the main one when not given.
    :raise KernelError: EPERM: needs CAP_SYS_PTRACE, or it is traced already; ESRCH: it has ended.

    Synchronization: ptrace belongs to the thread that seized, so one thread uses it from enter to exit.
    """

    def __init__(self, pid: int, tid: int | None = None) -> None:
        self._pid = pid
        self._tid = pid if tid is None else tid
        self._instruction = _syscall_instruction(pid, proc.start_time(pid))
        self._saved = user_regs_struct()
        self._signals: list[int] = []

    def __enter__(self) -> Stopped:
        _ptrace("SEIZE", PTRACE_SEIZE, self._tid)
        try:
            _ptrace("INTERRUPT", PTRACE_INTERRUPT, self._tid)
            self._wait_event_stop()
            _ptrace("GETREGS", PTRACE_GETREGS, self._tid, 0, ctypes.addressof(self._saved))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._set(self._saved)
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
        finally:
            self._detach()

    def _detach(self) -> None:
        try:
            _ptrace("DETACH", PTRACE_DETACH, self._tid)
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
            return
        for number in self._signals:
            # Taken from it while it worked for us: it gets them now.
            libc.syscall(234, self._pid, self._tid, number)
        self._signals.clear()

    def _status(self) -> int:
        _, status = os.waitpid(self._tid, _WALL)
        if not os.WIFSTOPPED(status):
            raise KernelError(f"stop of thread {self._tid} of process {self._pid}, which ended", errno.ESRCH)
        return status

    def _wait_event_stop(self) -> None:
        while (status := self._status()) >> 16 != _EVENT_STOP:
            self._signals.append(os.WSTOPSIG(status))
            _ptrace("CONT", PTRACE_CONT, self._tid)

    def _set(self, registers: user_regs_struct) -> None:
        _ptrace("SETREGS", PTRACE_SETREGS, self._tid, 0, ctypes.addressof(registers))

    def _run(self, operation: str, request: int) -> None:
        """Let the thread go until the trap that ends the step or the stub; keep signals for later."""
        while True:
            _ptrace(operation, request, self._tid)
            status = self._status()
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP and status >> 16 == 0:
                return
            if status >> 16 != _EVENT_STOP:
                self._signals.append(number)

    def _registers(self) -> user_regs_struct:
        registers = user_regs_struct.from_buffer_copy(bytes(self._saved))
        # No system call to restart: we are not in the one it may have been stopped in.
        registers.orig_rax = (1 << 64) - 1
        return registers

    def syscall(self, operation: str, number: int, *arguments: int) -> int:
        """Have the thread make one system call.

        :raise KernelError: it failed there, or the process ended.
        """
        registers = self._registers()
        registers.rax, registers.rip = number, self._instruction
        for name, argument in zip(_ARGUMENTS, arguments, strict=False):
            setattr(registers, name, argument & ((1 << 64) - 1))
        self._set(registers)
        self._run("SINGLESTEP", PTRACE_SINGLESTEP)
        _ptrace("GETREGS", PTRACE_GETREGS, self._tid, 0, ctypes.addressof(registers))
        result = ctypes.c_longlong(registers.rax).value
        if -4096 < result < 0:
            raise KernelError(f"{operation} in process {self._pid}", -result)
        return result

    def batch(self, calls: NDArray[np.int64]) -> NDArray[np.int64]:
        """Have the thread make many system calls without stopping in between.

        :param calls: shape (n, 7): number and six arguments of each.
        :return: shape (n,): each result, negated errno where it failed.
        :raise KernelError: the process ended, or has no room for the stub.
        """
        count = len(calls)
        if count == 0:
            return np.empty(0, dtype=np.int64)
        table: NDArray[np.int64] = np.zeros((count, _ROW), dtype=np.int64)
        table[:, :7] = calls
        size = mmap.PAGESIZE + -(-table.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        room = self.syscall("mmap of the stub", SYS_mmap, 0, size, everything, private, -1, 0)
        try:
            with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(room)
                memory.write(_STUB)
                _write_all(memory.fileno(), table.tobytes(), room + mmap.PAGESIZE)
                registers = self._registers()
                registers.rip, registers.r12, registers.r13 = room, room + mmap.PAGESIZE, count
                self._set(registers)
                self._run("CONT", PTRACE_CONT)
                raw = bytearray(table.nbytes)
                done = 0
                while done < len(raw):
                    done += os.preadv(memory.fileno(), [memoryview(raw)[done:]], room + mmap.PAGESIZE + done)
        finally:
            self.syscall("munmap of the stub", SYS_munmap, room, size)
        return np.frombuffer(raw, dtype=np.int64).reshape(count, _ROW)[:, 7].copy()


def _write_all(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)


def inject_userfaultfd(pid: int, tid: int | None = None) -> tuple[int, int]:
    """Make a userfaultfd for the address space of process ``pid``.

    :return: our descriptor, and the number of the one that stays open inside the process. As long as that one is open,
        faults wait for a manager; when the last closes, absent pages read as zeros.
    :raise KernelError: EPERM; ESRCH.
    """
    with Stopped(pid, tid) as target:
        theirs = target.syscall("userfaultfd", SYS_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
        process = pidfd.open(pid)
        try:
            return pidfd.getfd(process, theirs), theirs
        except KernelError:
            target.syscall("close", SYS_close, theirs)
            raise
        finally:
            pidfd.close(process)


def close_in_target(pid: int, number: int, tid: int | None = None) -> None:
    """Close descriptor ``number`` of process ``pid``."""
    with Stopped(pid, tid) as target:
        target.syscall(f"close of descriptor {number}", SYS_close, number)
