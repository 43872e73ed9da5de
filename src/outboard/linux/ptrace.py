"""ptrace(2): system calls made by another process, one thread of it stopped for microseconds.

The thread is seized, not attached, so that it gets no signal; it is put at a ``syscall`` instruction that is mapped in
it anyway (libc, the vdso), stepped over it, and put back exactly. For thousands of calls a stub is written into the
target once, which makes them all in one stop.

Signals wait meanwhile, with all that came along with them: the thread's own mask is set aside for one that leaves only
what its own instructions can raise. Job control goes on: a process that is stopped stays so, or stops when we are done.

Choose a thread that may wait a little, never a vCPU; one that sleeps in a fault which the kernel took on its behalf
does not stop before that is served. If we are killed (SIGKILL) between a step and the return of the registers, the
thread goes on at the wrong place: nothing can be done about that, so the signals that people send wait here too.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux import pidfd, proc, userfaultfd
from outboard.linux.libc import layout, libc, syscall, u64

PTRACE_CONT = 7
PTRACE_SINGLESTEP = 9
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
_WALL = 0x40000000
_EVENT_STOP = 128

SYS_close = 3
SYS_mmap = 9
SYS_munmap = 11
SYS_ioctl = 16
SYS_recvmsg = 47
SYS_socketpair = 53
SYS_clone = 56
SYS_tgkill = 234

_RAISED_BY_ITSELF = {
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGSEGV,
    signal.SIGSYS,
}
"""What the kernel forces on a thread: were one of them blocked, its handler would be lost."""
_ALL_BUT_THESE = ((1 << 64) - 1) & ~sum(1 << number - 1 for number in _RAISED_BY_ITSELF)
_SENT_BY_PEOPLE = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}

libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

_SYSCALL = b"\x0f\x05"


@layout(216)
class user_regs_struct(ctypes.Structure):
    """<sys/user.h>, x86-64."""

    r15: u64
    r14: u64
    r13: u64
    r12: u64
    rbp: u64
    rbx: u64
    r11: u64
    r10: u64
    r9: u64
    r8: u64
    rax: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    orig_rax: u64
    rip: u64
    cs: u64
    eflags: u64
    rsp: u64
    ss: u64
    fs_base: u64
    gs_base: u64
    ds: u64
    es: u64
    fs: u64
    gs: u64


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


def _read(pid: int, address: int, length: int) -> bytes:
    """Memory of a process.

    :raise KernelError: EFAULT or EIO: nothing is mapped there; ESRCH: it has ended.
    """
    operation = f"read of {length} bytes at {address:#x} of process {pid}"
    raw = bytearray(length)
    done = 0
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            while done < length:
                step = os.preadv(memory.fileno(), [memoryview(raw)[done:]], address + done)
                if step == 0:
                    raise KernelError(operation, errno.ESRCH)
                done += step
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    return bytes(raw)


def _write(pid: int, address: int, data: bytes) -> None:
    operation = f"write of {len(data)} bytes at {address:#x} of process {pid}"
    done = 0
    try:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            while done < len(data):
                step = os.pwrite(memory.fileno(), memoryview(data)[done:], address + done)
                if step == 0:
                    raise KernelError(operation, errno.ESRCH)
                done += step
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error


@lru_cache(maxsize=256)
def _syscall_instruction(pid: int, _started: int) -> int:
    for mapping in proc.maps(pid):
        if "x" in mapping.permissions and ("libc" in mapping.path or "[vdso]" in mapping.path):
            at = _read(pid, mapping.start, mapping.end - mapping.start).find(_SYSCALL)
            if at >= 0:
                return mapping.start + at
    raise KernelError(f"search for a syscall instruction in process {pid}", errno.ENOENT)


def _is_syscall(pid: int, address: int) -> bool:
    try:
        return _read(pid, address, len(_SYSCALL)) == _SYSCALL
    except KernelError as error:
        if error.errno not in (errno.EIO, errno.EFAULT):
            raise
        return False


class Stopped:
    """One thread of a process, stopped; a context manager, used once.

    :param tid: which thread; the main one when not given.
    :raise KernelError: EPERM: needs CAP_SYS_PTRACE, or it is traced already; ESRCH: it has ended.

    Synchronization: ptrace belongs to the thread that seized, so one thread uses it from enter to exit.
    """

    def __init__(self, pid: int, tid: int | None = None) -> None:
        self._pid = pid
        self._tid = pid if tid is None else tid
        self._instruction = _syscall_instruction(pid, proc.start_time(pid))
        self._saved: user_regs_struct | None = None
        self._mask: int | None = None
        self._traced = self._running = False
        self._foreign_traps = 0

    def __enter__(self) -> Stopped:
        self._held = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_BY_PEOPLE)
        try:
            self._seize()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._let_go()

    def _seize(self) -> None:
        _ptrace("SEIZE", PTRACE_SEIZE, self._tid)
        self._traced = self._running = True
        _ptrace("INTERRUPT", PTRACE_INTERRUPT, self._tid)
        self._await_event_stop()
        self._saved = self._get()
        mask = ctypes.c_uint64()
        _ptrace("GETSIGMASK", PTRACE_GETSIGMASK, self._tid, 8, ctypes.addressof(mask))
        self._mask = mask.value
        self._set_mask(_ALL_BUT_THESE)
        if not _is_syscall(self._pid, self._instruction):
            # It has become another program since we looked (execve), under the same number.
            _syscall_instruction.cache_clear()
            self._instruction = _syscall_instruction(self._pid, proc.start_time(self._pid))

    def _let_go(self) -> None:
        try:
            if self._traced:
                self._restore()
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._held)

    def _restore(self) -> None:
        passed_on = 0
        if self._running:
            # An exception took us out of a wait: the stop that was waited for is still to come.
            status = self._wait()
            number = os.WSTOPSIG(status)
            passed_on = number if status >> 16 == 0 and number not in _RAISED_BY_ITSELF else 0
        if self._saved is not None:
            self._set(self._saved)
        if self._mask is not None:
            self._set_mask(self._mask)
        _ptrace("DETACH", PTRACE_DETACH, self._tid, 0, passed_on)
        for _ in range(self._foreign_traps):
            syscall("tgkill", SYS_tgkill, self._pid, self._tid, signal.SIGTRAP)

    def _wait(self) -> int:
        """The status of the next stop."""
        try:
            found = os.waitid(os.P_PID, self._tid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | _WALL)
            ended = found is None or found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
            self._running = False
            # Whoever traces it has to see it off; but how a child of ours ended is for whoever started it to learn.
            if not ended or self._tid != self._pid or proc.parent(self._pid) != os.getpid():
                _, status = os.waitpid(self._tid, _WALL)
        except (ChildProcessError, KernelError):
            # Somebody has waited for it already.
            ended = True
        if ended:
            self._traced = self._running = False
            raise KernelError(f"wait for thread {self._tid} of process {self._pid}, which ended", errno.ESRCH)
        return status

    def _resume(self, operation: str, request: int, number: int = 0) -> None:
        _ptrace(operation, request, self._tid, 0, number)
        self._running = True

    def _await_event_stop(self) -> None:
        while (status := self._wait()) >> 16 != _EVENT_STOP:
            self._resume("CONT", PTRACE_CONT, os.WSTOPSIG(status))

    def _get(self) -> user_regs_struct:
        registers = user_regs_struct()
        _ptrace("GETREGS", PTRACE_GETREGS, self._tid, 0, ctypes.addressof(registers))
        return registers

    def _set(self, registers: user_regs_struct) -> None:
        _ptrace("SETREGS", PTRACE_SETREGS, self._tid, 0, ctypes.addressof(registers))

    def _set_mask(self, mask: int) -> None:
        raw = ctypes.c_uint64(mask)
        _ptrace("SETSIGMASK", PTRACE_SETSIGMASK, self._tid, 8, ctypes.addressof(raw))

    def _run(
        self, operation: str, request: int, what: str, registers: user_regs_struct, length: int
    ) -> user_regs_struct:
        """Let the thread go with ``registers`` until the trap behind ``length`` bytes of code; its registers then."""
        end = registers.rip + length
        caught_by_filter = False
        self._set(registers)
        self._resume(operation, request)
        while True:
            status = self._wait()
            number = os.WSTOPSIG(status)
            passed_on = 0
            if status >> 16 == 0:
                after = self._get()
                if number == signal.SIGTRAP and after.rip == end:
                    break
                if number == signal.SIGTRAP:
                    self._foreign_traps += 1
                elif number == signal.SIGSYS:
                    # The call was left out; the trap at the end still comes.
                    caught_by_filter = True
                elif number in _RAISED_BY_ITSELF:
                    raise KernelError(f"{what} in process {self._pid} ({signal.Signals(number).name})", errno.EFAULT)
                else:
                    # SIGSTOP, which no mask holds back: the others stop now, this thread when we are done.
                    passed_on = number
            self._resume(operation, request, passed_on)
        if caught_by_filter:
            raise KernelError(f"{what} in process {self._pid}, where a seccomp filter caught it", errno.EPERM)
        return after

    def _registers(self) -> user_regs_struct:
        if self._saved is None:
            raise ValueError(f"thread {self._tid} of process {self._pid} is not stopped: use it in a with statement")
        registers = user_regs_struct.from_buffer_copy(self._saved)
        # No system call to restart: we are not in the one it may have been stopped in.
        registers.orig_rax = (1 << 64) - 1
        return registers

    def syscall(self, operation: str, number: int, *arguments: int) -> int:
        """Have the thread make one system call.

        :raise KernelError: it failed there, or the process ended; EPERM also when a seccomp filter caught it.
        """
        registers = self._registers()
        registers.rax, registers.rip = number, self._instruction
        for name, argument in zip(_ARGUMENTS, arguments, strict=False):
            setattr(registers, name, argument & ((1 << 64) - 1))
        after = self._run("SINGLESTEP", PTRACE_SINGLESTEP, operation, registers, len(_SYSCALL))
        return self._result(operation, after)

    def _result(self, operation: str, after: user_regs_struct) -> int:
        result = ctypes.c_longlong(after.rax).value
        if -4096 < result < 0:
            raise KernelError(f"{operation} in process {self._pid}", -result)
        return result

    def spawn(self, code: int, length: int, flags: int, base: int, number: int) -> int:
        """Have the process make a thread by code of ours in it; the thread's number.

        :param code: ``length`` bytes that begin with the system call and end with a trap for the thread that made it;
            the new one goes on behind them, with ``base`` in rbx and ``number`` in r14, and all signals blocked but
            those that its own instructions can raise.
        :raise KernelError: EAGAIN: no more threads are allowed; EPERM: a seccomp filter caught it.
        """
        registers = self._registers()
        registers.rip, registers.rax, registers.rdi = code, SYS_clone, flags
        registers.rsi = registers.rdx = registers.r10 = registers.r8 = 0
        registers.rbx, registers.r14 = base, number
        return self._result("clone", self._run("CONT", PTRACE_CONT, "clone", registers, length))

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
        everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        with _Room(self, mmap.PAGESIZE + table.nbytes, everything) as room:
            at = room + mmap.PAGESIZE
            _write(self._pid, room, _STUB)
            _write(self._pid, at, table.tobytes())
            registers = self._registers()
            registers.rip, registers.r12, registers.r13 = room, at, count
            self._run("CONT", PTRACE_CONT, f"batch of {count} calls", registers, len(_STUB))
            raw = _read(self._pid, at, table.nbytes)
        return np.frombuffer(raw, dtype=np.int64).reshape(count, _ROW)[:, 7].copy()


class _Room:
    """Memory of the target's, for as long as a with statement lasts."""

    def __init__(self, target: Stopped, size: int, protection: int) -> None:
        self._target = target
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._protection = protection

    def __enter__(self) -> int:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._at = self._target.syscall("mmap", SYS_mmap, 0, self._size, self._protection, private, -1, 0)
        return self._at

    def __exit__(self, *_exc: object) -> None:
        self._target.syscall("munmap", SYS_munmap, self._at, self._size)


def inject_userfaultfd(pid: int, tid: int | None = None) -> tuple[int, int]:
    """Make a userfaultfd for the address space of process ``pid``.

    A process without CAP_SYS_PTRACE may not make one that sees the kernel's own accesses, as KVM's are; it is then
    handed /dev/userfaultfd, opened by us.

    :return: our descriptor, and the number of the one that stays open inside the process. As long as that one is open,
        faults wait for a manager; when the last closes, absent pages read as zeros.
    :raise KernelError: EPERM; ESRCH.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    with Stopped(pid, tid) as target:
        process = pidfd.open(pid)
        try:
            try:
                theirs = target.syscall("userfaultfd", userfaultfd.SYS_userfaultfd, flags)
            except KernelError as error:
                if error.errno != errno.EPERM:
                    raise
                with userfaultfd.open_device() as device:
                    at = _hand_over(target, pid, process, device.fileno())
                try:
                    theirs = target.syscall(
                        "USERFAULTFD_IOC_NEW", SYS_ioctl, at, userfaultfd.USERFAULTFD_IOC_NEW, flags
                    )
                finally:
                    target.syscall("close", SYS_close, at)
            try:
                return pidfd.getfd(process, theirs), theirs
            except KernelError:
                target.syscall("close", SYS_close, theirs)
                raise
        finally:
            pidfd.close(process)


MESSAGE = struct.Struct("<QI4xQQQQi4xQQ")
"""struct msghdr: name, its length, vector, its length, control, its length, flags; then the one iovec."""
CONTROL = struct.Struct("<Qiii4x")
"""struct cmsghdr of one descriptor: length, level, type; the descriptor."""


def _hand_over(target: Stopped, pid: int, process: int, fd: int) -> int:
    """Give the target a duplicate of our descriptor ``fd``; its number there."""
    with _Room(target, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) as room:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        target.syscall("socketpair", SYS_socketpair, socket.AF_UNIX, kind, 0, room)
        pair = struct.unpack("<2i", _read(pid, room, 8))
        try:
            with socket.socket(fileno=pidfd.getfd(process, pair[0])) as ours:
                socket.send_fds(ours, [b"\0"], [fd])
            vector, control, data = room + 56, room + 128, room + 256
            _write(pid, room, MESSAGE.pack(0, 0, vector, 1, control, CONTROL.size, 0, data, 1))
            target.syscall("recvmsg", SYS_recvmsg, pair[1], room, socket.MSG_CMSG_CLOEXEC)
            return int(CONTROL.unpack(_read(pid, control, CONTROL.size))[3])
        finally:
            for end in pair:
                target.syscall("close", SYS_close, end)


def close_in_target(pid: int, number: int, tid: int | None = None) -> None:
    """Close descriptor ``number`` of process ``pid``."""
    with Stopped(pid, tid) as target:
        target.syscall(f"close of descriptor {number}", SYS_close, number)
