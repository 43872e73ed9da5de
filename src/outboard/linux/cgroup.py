"""cgroups(7), the cpu controller: how much processor time a few threads of a process may have.

Version 1 (Documentation/admin-guide/cgroup-v1, cpu.cfs_quota_us) takes single threads as they are. In version 2
(cgroup-v2.rst, cpu.max) threads of one process may part only inside a threaded subtree, so the group is made threaded,
which makes the process's own group the subtree's root; the kernel refuses that (EOPNOTSUPP) where that group hands
controllers down that work on whole processes, such as memory.

A group competes as one thread would, whatever is in it; so its weight grows with its threads, and being in it costs
them nothing until a limit is set.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from outboard.errors import KernelError
from outboard.linux import proc

_LONGEST_US, _SHORTEST_US = 100_000, 10_000
"""Of enforcement, in microseconds."""
_LEAST_QUOTA_US = 1_000
"""What the kernel takes at least."""


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise KernelError(f"write of {value!r} to {path}", error.errno or 0) from error


def _hierarchy() -> tuple[int, Path] | None:
    """Version and mount point of the hierarchy that has the cpu controller."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        mount = Path(target)
        if kind == "cgroup" and "cpu" in options.split(","):
            return 1, mount
        if kind == "cgroup2" and "cpu" in (mount / "cgroup.controllers").read_text().split():
            return 2, mount
    return None


def cpu_version() -> int | None:
    """Whether version 1 or 2 has the cpu controller on this machine; None: it is not mounted."""
    hierarchy = _hierarchy()
    return hierarchy[0] if hierarchy else None


def _period_us(processors: float) -> int:
    """As short as the least quota lets it be: who is held back stands still for the rest of each period."""
    return round(min(_LONGEST_US, max(_SHORTEST_US, _LEAST_QUOTA_US / processors)))


def _group_of(pid: int, tid: int, version: int, mount: Path) -> Path:
    try:
        lines = Path(f"/proc/{pid}/task/{tid}/cgroup").read_text().splitlines()
    except OSError as error:
        raise KernelError(f"read of /proc/{pid}/task/{tid}/cgroup", error.errno or 0) from error
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(",") if version == 1 else not controllers:
            return mount / path.lstrip("/")
    raise KernelError(f"search for the cpu group of thread {tid}", errno.ENOENT)


def names(pid: int) -> set[str]:
    """The names of the groups that the threads of process ``pid`` are in; none where no cpu controller is mounted.

    :raise KernelError: it has ended.
    """
    hierarchy = _hierarchy()
    if hierarchy is None:
        return set()
    found = set()
    for thread in proc.threads(pid):
        # One that has ended meanwhile is in none.
        with contextlib.suppress(KernelError):
            found.add(_group_of(pid, thread.tid, *hierarchy).name)
    return found


class CpuGroup:
    """A group below the one that process ``pid`` is in, for some of its threads; a context manager.

    A group of that name that a predecessor left behind is taken over, with the threads in it.
    ``path`` is its directory.

    :raise KernelError: ENOENT: no cpu controller is mounted; EACCES, EROFS: groups cannot be made there; EOPNOTSUPP:
        version 2 hands controllers down in the process's group that do not work on threads.

    Synchronization: one thread.
    """

    def __init__(self, name: str, pid: int) -> None:
        hierarchy = _hierarchy()
        if hierarchy is None:
            raise KernelError("search for a mounted cpu controller", errno.ENOENT)
        self._version, self._mount = hierarchy
        self._pid = pid
        self._home = _group_of(pid, pid, self._version, self._mount)
        self.path = self._home / name
        self._members = self.path / ("tasks" if self._version == 1 else "cgroup.threads")
        self._came_from: dict[int, Path] = {}
        self._handed_down = False
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise KernelError(f"mkdir of {self.path}", error.errno or 0) from error
        try:
            if self._version == 2:
                self._make_threaded()
        except KernelError:
            self.path.rmdir()
            raise

    def _make_threaded(self) -> None:
        _write(self.path / "cgroup.type", "threaded")
        switch = self._home / "cgroup.subtree_control"
        if "cpu" not in switch.read_text().split():
            _write(switch, "+cpu")
            self._handed_down = True

    def __enter__(self) -> CpuGroup:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def threads(self) -> list[int]:
        """Who is in it; what a member starts is too."""
        try:
            return sorted(int(line) for line in self._members.read_text().split())
        except OSError as error:
            raise KernelError(f"read of {self._members}", error.errno or 0) from error

    def add(self, tid: int) -> None:
        """Put a thread of the process in.

        :raise KernelError: ESRCH: it has ended; EINVAL: it is a real-time thread, and the kernel groups those apart.
        """
        came_from = _group_of(self._pid, tid, self._version, self._mount)
        _write(self._members, str(tid))
        if came_from != self.path:
            self._came_from[tid] = came_from
        count = len(self.threads())
        if self._version == 1:
            _write(self.path / "cpu.shares", str(min(1024 * count, 262_144)))
        else:
            _write(self.path / "cpu.weight", str(min(100 * count, 10_000)))

    def limit(self, processors: float | None) -> None:
        """Let all of them together have so much processor time: 0.5 is half of one; None is no limit.

        :raise KernelError: EINVAL: less than 0.01, or in version 1 more than a group above has.
        """
        period = _LONGEST_US if processors is None else _period_us(processors)
        quota = None if processors is None else round(processors * period)
        if self._version == 1:
            # No limit in between: an old quota in a new period may be more than the group above has.
            _write(self.path / "cpu.cfs_quota_us", "-1")
            _write(self.path / "cpu.cfs_period_us", str(period))
            if quota is not None:
                _write(self.path / "cpu.cfs_quota_us", str(quota))
        else:
            _write(self.path / "cpu.max", f"{'max' if quota is None else quota} {period}")

    def throttled(self) -> int:
        """In how many periods so far its threads wanted more than the limit."""
        words = (self.path / "cpu.stat").read_text().split()
        return int(words[words.index("nr_throttled") + 1])

    def close(self) -> None:
        """Put the threads back where each was and remove the group. Idempotent.

        :raise KernelError: EBUSY: a member starts threads faster than they are moved; the limit is lifted.
        """
        if not self.path.exists():
            return
        self.limit(None)
        back = "tasks" if self._version == 1 else "cgroup.threads"
        for tid in self.threads():
            try:
                _write(self._came_from.get(tid, self._home) / back, str(tid))
            except KernelError as error:
                if error.errno != errno.ESRCH:
                    raise
        try:
            self.path.rmdir()
        except OSError as error:
            raise KernelError(f"rmdir of {self.path}", error.errno or 0) from error
        if self._handed_down and not any(self._home.glob("*/cgroup.type")):
            _write(self._home / "cgroup.subtree_control", "-cpu")
