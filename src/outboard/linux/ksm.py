"""Kernel samepage merging, Documentation/admin-guide/mm/ksm.rst; madvise(2) MADV_MERGEABLE; /proc/PID/ksm_stat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outboard.errors import KernelError

MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
_SETTINGS = Path("/sys/kernel/mm/ksm")


@dataclass(frozen=True, slots=True)
class KsmStatistics:
    """Of a process: pages ``merged`` with others, and with the page of ``zeros``; ``profit``, bytes that this saves."""

    merged: int
    zeros: int
    profit: int


def present() -> bool:
    """Whether the kernel has KSM."""
    return _SETTINGS.is_dir()


def setting(name: str, value: int | None = None) -> int:
    """One of the files of /sys/kernel/mm/ksm, which is written first where ``value`` is given.

    :raise KernelError: there is none of that name, or it cannot be written.
    """
    path = _SETTINGS / name
    try:
        if value is not None:
            path.write_text(str(value))
        return int(path.read_text())
    except OSError as error:
        raise KernelError(f"{'write' if value is not None else 'read'} of {path}", error.errno or 0) from error


def statistics(pid: int) -> KsmStatistics:
    """What KSM has merged of a process (Linux 6.1).

    :raise KernelError: it has ended; ENOENT also where the kernel does not tell.
    """
    path = Path(f"/proc/{pid}/ksm_stat")
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise KernelError(f"read of {path}", error.errno or 0) from error
    # Later kernels add words, which are of no matter here.
    told = dict(line.split()[:2] for line in lines)
    numbers = {name: int(value) for name, value in told.items() if value.lstrip("-").isdigit()}
    return KsmStatistics(
        numbers.get("ksm_merging_pages", 0), numbers.get("ksm_zero_pages", 0), numbers.get("ksm_process_profit", 0)
    )
