"""The threads of a running guest: which there are, how busy they are, and binding them to nodes.

A thread is bound to all processors of a node that it may use, and which of them runs it is left to the kernel. What it
was bound to before is kept in a file, by which it is put back; a thread that has started since inherited ours, and gets
what the process's first thread had.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError
from outboard.linux import proc
from outboard.numa.placement import Load
from outboard.vmm.guest import Guest

_STATE, _PROCESSOR = 0, 36
"""Of the fields of /proc/PID/task/TID/stat that follow the name."""


class Resident(NamedTuple):
    """A thread of a guest; ``number``: of a vCPU. ``processor``: where it last ran; ``busy``: its part of the time."""

    tid: int
    role: Literal["vcpu", "emulator", "io"]
    number: int
    processor: int
    busy: float


class Affinities(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.numa-affinities.v1"):
    """What threads might run on before they were bound."""

    pid: int
    start_time: int
    threads: dict[int, list[int]]


def _stat(path: str) -> list[str]:
    return Path(path).read_text().rpartition(")")[2].split()


def residents(guest: Guest, seconds: float) -> list[Resident]:
    """The guest's threads, watched for so many seconds. A process that is no VM has each thread taken for a vCPU.

    :raise KernelError: it has ended.
    """
    vcpus = {vcpu.tid: vcpu.index for vcpu in guest.vcpus}
    present = proc.threads(guest.pid)
    if not vcpus:
        vcpus = {thread.tid: number for number, thread in enumerate(present)}
    before, began = {one.tid: proc.processor_seconds(guest.pid, one.tid) for one in present}, time.monotonic()
    time.sleep(seconds)
    passed = max(1e-3, time.monotonic() - began)
    found = []
    for thread in present:
        with contextlib.suppress(OSError):
            busy = (proc.processor_seconds(guest.pid, thread.tid) - before[thread.tid]) / passed
            processor = int(_stat(f"/proc/{guest.pid}/task/{thread.tid}/stat")[_PROCESSOR])
            role: Literal["vcpu", "emulator", "io"] = "emulator" if thread.tid == guest.pid else "io"
            role = "vcpu" if thread.tid in vcpus else role
            found.append(Resident(thread.tid, role, vcpus.get(thread.tid, -1), processor, busy))
    if not found:
        raise NotFoundError(f"{guest.name}: process {guest.pid} has ended")
    return found


def load_of_others(mine: Collection[int], looks: int = 5, apart: float = 0.05) -> Load:
    """What runs or waits on each processor besides these processes, in the median of some looks."""
    counts: dict[int, list[int]] = {}
    for look in range(looks):
        for entry in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
            if int(entry.parts[2]) in mine or int(entry.parts[2]) == os.getpid():
                continue
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = _stat(str(entry))
                if fields[_STATE] == "R":
                    counts.setdefault(int(fields[_PROCESSOR]), [0] * looks)[look] += 1
        time.sleep(apart)
    return Load({processor: sorted(each)[looks // 2] for processor, each in counts.items()})


def bind(guest: Guest, wanted: Mapping[int, Collection[int]], kept: Path) -> None:
    """Bind threads to processors, and keep in ``kept`` what they were bound to, unless that is there already.

    :raise RefusedError: ``no-privilege``. :raise OutboardError: what was cannot be kept. Nothing is bound then.
    """
    before = read_kept(guest, kept)
    threads = dict(before.threads) if before is not None else {}
    for tid in wanted:
        with contextlib.suppress(ProcessLookupError):
            threads.setdefault(tid, sorted(os.sched_getaffinity(tid)))
    affinities = Affinities(guest.pid, proc.start_time(guest.pid), threads)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(affinities))
        draft.replace(kept)
    except OSError as error:
        raise OutboardError(f"cannot keep in {kept} what {guest.name}'s threads were bound to: {error}") from error
    for tid, processors in wanted.items():
        _set(guest, tid, processors)


def _set(guest: Guest, tid: int, processors: Collection[int]) -> None:
    try:
        os.sched_setaffinity(tid, processors)
    except ProcessLookupError:
        return
    except PermissionError:
        raise RefusedError(
            "no-privilege", f"{guest.name}: binding thread {tid} to processors takes CAP_SYS_NICE: run as root"
        ) from None
    except OSError as error:
        raise KernelError(f"sched_setaffinity of thread {tid} to {sorted(processors)}", error.errno or 0) from error


def read_kept(guest: Guest, kept: Path) -> Affinities | None:
    """What was kept of this very process; None: nothing.

    :raise KernelError: the process has ended.
    """
    try:
        found = msgspec.json.decode(kept.read_bytes(), type=Affinities)
    except (OSError, msgspec.DecodeError):
        return None
    return found if (found.pid, found.start_time) == (guest.pid, proc.start_time(guest.pid)) else None


def put_back(guest: Guest, kept: Path) -> int:
    """Put threads back to what they were bound to before; how many.

    :raise NotFoundError: they were not bound by us. :raise RefusedError: ``no-privilege``.
    """
    before = read_kept(guest, kept)
    if before is None:
        raise NotFoundError(f"{guest.name}: its threads were not placed; outboard numa place does that")
    usual = before.threads.get(guest.pid) or next(iter(before.threads.values()))
    present = proc.threads(guest.pid)
    for thread in present:
        _set(guest, thread.tid, before.threads.get(thread.tid, usual))
    kept.unlink(missing_ok=True)
    return len(present)
