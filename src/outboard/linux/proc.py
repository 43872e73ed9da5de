"""proc(5): what the kernel tells of a process: its mappings, threads, descriptors, command line."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from outboard.errors import KernelError


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps; addresses and offset in bytes."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """MAP_SHARED."""
        return self.permissions.endswith("s")


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread: its number and the name it gave itself."""

    tid: int
    name: str


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError as error:
        raise KernelError(f"read of /proc/{pid}/{name}", error.errno or 0) from error


def maps(pid: int) -> list[Mapping]:
    """The mappings of process ``pid``, by address.

    :raise KernelError: ENOENT or ESRCH: it has ended; EACCES.
    """
    found = []
    for line in _read(pid, "maps").decode(errors="surrogateescape").splitlines():
        addresses, permissions, offset, device, inode, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        found.append(Mapping(start, end, permissions, int(offset, 16), device, int(inode), path[0] if path else ""))
    return found


def open_mapping(pid: int, mapping: Mapping, flags: int = os.O_RDWR) -> int:
    """Open the file behind a mapping, also one that has no name any more.

    :raise KernelError: EPERM: needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; ENOENT: the mapping is gone.
    """
    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"open of {path}", error.errno or 0) from error


def smaps(pid: int, start: int) -> dict[str, str]:
    """The fields that smaps has for the mapping that begins at ``start``, sizes as the kernel spells them.

    :raise KernelError: it cannot be read; KeyError: no mapping begins there.
    """
    inside = False
    fields: dict[str, str] = {}
    for line in _read(pid, "smaps").decode(errors="surrogateescape").splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            if inside:
                break
            inside = int(head.partition("-")[0], 16) == start
        elif inside:
            fields[head.rstrip(":")] = rest.strip()
    if not fields:
        raise KeyError(f"process {pid} has no mapping that begins at {start:#x}")
    return fields


def threads(pid: int) -> list[Thread]:
    """The threads of process ``pid``, by number.

    :raise KernelError: it has ended.
    """
    try:
        numbers = sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    except OSError as error:
        raise KernelError(f"read of /proc/{pid}/task", error.errno or 0) from error
    found = []
    for tid in numbers:
        try:
            found.append(Thread(tid, Path(f"/proc/{pid}/task/{tid}/comm").read_text().rstrip("\n")))
        except OSError:
            # It ended between the two looks.
            continue
    return found


def _stat(pid: int, tid: int) -> list[str]:
    # The name, in parentheses, may hold anything; what follows the last of them is numbers.
    return _read(pid, f"task/{tid}/stat").decode(errors="replace").rpartition(")")[2].split()


def start_time(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot: with the pid it names a process for good.

    :raise KernelError: it has ended.
    """
    return int(_stat(pid, pid)[19])


def processor_seconds(pid: int, tid: int) -> float:
    """For how long a thread has run, to the tick of 10 ms.

    :raise KernelError: it has ended.
    """
    user, system = _stat(pid, tid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def queued_ns() -> int:
    """For how long this thread has been ready to run and waited for a processor; 0 where the kernel does not count it.

    Source: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1])
    except FileNotFoundError:
        return 0


def parent(pid: int) -> int:
    """The process that started process ``pid``, or adopted it.

    :raise KernelError: it has ended and been waited for.
    """
    return int(_stat(pid, pid)[1])


def wait_stopped(pid: int, timeout: float = 5.0) -> None:
    """Wait until every thread of a process that was sent SIGSTOP has stopped.

    :raise TimeoutError: one has not.
    """
    deadline = time.monotonic() + timeout
    while any(_stat(pid, thread.tid)[0] not in "Tt" for thread in threads(pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {timeout} s")
        os.sched_yield()


def command_line(pid: int) -> list[str]:
    """The arguments that process ``pid`` was started with.

    :raise KernelError: it has ended.
    """
    return _read(pid, "cmdline").decode(errors="surrogateescape").rstrip("\0").split("\0")


def descriptors(pid: int) -> dict[int, str]:
    """What each open descriptor of process ``pid`` refers to, as readlink(2) tells.

    :raise KernelError: it has ended; EACCES.
    """
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError as error:
        raise KernelError(f"read of /proc/{pid}/fd", error.errno or 0) from error
    found = {}
    for entry in entries:
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:
            continue
    return found


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes, and counts where it has no unit."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        found[name] = int(number) * (1024 if unit == "kB" else 1)
    return found
