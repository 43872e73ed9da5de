"""One scheduling group for all that a testbed runs.

Linux puts every session into a group of its own (CONFIG_SCHED_AUTOGROUP) and is fair between groups first. With two
busy VMs pinned to one core this has been seen to stop one of them for seconds (Linux 6.18), which would be charged to
whatever is measured at the time. Tasks within a cgroup of the cpu controller are scheduled against one another as what
they are, so the testbed's process enters one before it starts anything; what it starts is born there. Nothing of the
machine's own settings is changed.

Source: sched(7), "The autogroup feature"; cgroups(7).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

_SESSIONS = 8
"""How much of a busy machine the group gets beside a single session: VMs, agents and client would be as many."""
_REAL_TIME_US = 400_000
"""Of each second: a new group of version 1 may run no real-time task, as those of a host's ordinary services may."""


def _hierarchy() -> tuple[Path, Path] | None:
    """The root of the hierarchy with the cpu controller and this process's group in it; None where there is none."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, where, kind, options, *_ in mounts:
        root = Path(where)
        if kind == "cgroup" and "cpu" in options.split(","):
            own = next((path for _, controllers, path in groups if "cpu" in controllers.split(",")), "/")
            return root, root / own.lstrip("/")
        if kind == "cgroup2" and "cpu" in (root / "cgroup.subtree_control").read_text().split():
            own = next((path for number, _, path in groups if number == "0"), "/")
            return root, root / own.lstrip("/")
    return None


def _move(source: Path, destination: Path) -> None:
    for pid in (source / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            (destination / "cgroup.procs").write_text(pid)


class SchedulingGroup:
    """The group; made and entered by :meth:`enter`.

    On a machine without the cpu controller it does nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._before: Path | None = None

    def enter(self) -> None:
        """Make the group and move this process there."""
        hierarchy = _hierarchy()
        if hierarchy is not None:
            root, self._before = hierarchy
            group = root / self._name
            group.mkdir()
            for name, value in [("cpu.shares", 1024 * _SESSIONS), ("cpu.weight", 100 * _SESSIONS)]:  # version 1, 2
                if (group / name).exists():
                    (group / name).write_text(str(value))
            # EINVAL: its siblings were promised too much already. Then nothing in it is real-time.
            with contextlib.suppress(OSError):
                (group / "cpu.rt_runtime_us").write_text(str(_REAL_TIME_US))
            (group / "cgroup.procs").write_text("0")

    def close(self) -> None:
        """Move everything back and remove the group; idempotent."""
        if self._before is not None:
            remove(self._name, self._before)
            self._before = None


def remove(name: str, destination: Path | None = None) -> None:
    """Remove a group by its name, if there is one; what is still in it goes to *destination*, the root by default."""
    hierarchy = _hierarchy()
    if hierarchy is not None and (hierarchy[0] / name).is_dir():
        _move(hierarchy[0] / name, destination or hierarchy[0])
        (hierarchy[0] / name).rmdir()
