"""The brake: holds back the vCPUs that write, each by itself, and no other thread.

Each has a group of its own in the cpu controller, so that the share of one is nobody else's. Whoever holds the brake
may die: the groups have its pid in their names, by which :func:`release_left_over` finds them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Self

from outboard.errors import KernelError
from outboard.linux import cgroup, pidfd
from outboard.linux.cgroup import CpuGroup
from outboard.vmm.guest import Guest

_NAME = "outboard-brake-"
_LEAST = 0.01
"""Of a processor: what the cpu controller can hold a thread to."""


class Brake:
    """Holds back threads of ``guest``; nothing is held until :meth:`hold`.

    :param usual: each thread with the part of a processor that it takes when nobody holds it back.
    :raise KernelError: as :class:`~outboard.linux.cgroup.CpuGroup`; nothing is changed then.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest, usual: Mapping[int, float]) -> None:
        self._usual = dict(usual)
        self._groups: dict[int, CpuGroup] = {}
        try:
            for tid in usual:
                group = self._groups[tid] = CpuGroup(f"{_NAME}{os.getpid()}-{tid}", guest.pid)
                group.add(tid)
        except KernelError:
            self.release()
            raise

    def hold(self, share: float) -> None:
        """Let each thread have ``share`` of what it takes usually; 1 is all."""
        for tid, group in self._groups.items():
            group.limit(None if share >= 1 else max(_LEAST, share * self._usual[tid]))

    def release(self) -> None:
        """Let go, and put the threads back where they were. Idempotent.

        A group that cannot be removed yet, as its threads are ending, holds nobody; :func:`release_left_over` finds it.
        """
        groups, self._groups = self._groups, {}
        for group in groups.values():
            with contextlib.suppress(KernelError):
                group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


def release_left_over(pid: int) -> int:
    """Let go of the threads of process ``pid`` that a holder which has died held back; how many there were.

    :raise KernelError: the process has ended.
    """
    left = [name for name in cgroup.names(pid) if name.startswith(_NAME) and not pidfd.alive(_holder(name))]
    for name in left:
        CpuGroup(name, pid).close()
    return len(left)


def _holder(name: str) -> int:
    return int(name.removeprefix(_NAME).partition("-")[0])
