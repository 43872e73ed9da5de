"""Others that move memory and threads between nodes: numad, and the kernel's own NUMA balancing.

The kernel has no switch for a single process: NUMA balancing is on or off for the host, by
/proc/sys/kernel/numa_balancing. It passes over mappings of tmpfs that have no memory policy of their own.

Source: Documentation/admin-guide/sysctl/kernel.rst, vma_policy_mof() in mm/mempolicy.c, numad(8).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from outboard.errors import RefusedError
from outboard.linux.numa import several_nodes

BALANCING = Path("/proc/sys/kernel/numa_balancing")


def balancing(path: Path = BALANCING) -> bool:
    """Whether the kernel balances; no where it cannot."""
    try:
        return path.read_text().strip() != "0"
    except OSError:
        return False


def numad(root: Path = Path("/proc")) -> int:
    """The process of a numad that runs; 0: none does."""
    for entry in root.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if entry.read_text().strip() == "numad":
                return int(entry.parent.name)
    return 0


def warnings(*, paused: bool = False) -> list[str]:
    """Who may undo what is placed and moved here, in words."""
    words: list[str] = []
    if not several_nodes():
        return words
    if balancing() and not paused:
        words.append(
            "the kernel's NUMA balancing is on: it moves threads that are not bound to where their own memory is; "
            "memory in files (memfd, /dev/shm), as VMs' is, it leaves alone unless that has a policy by mbind. "
            "--pause-balancing of outboard numa move turns it off meanwhile, for all of the host: the kernel has no "
            "switch for one process"
        )
    if pid := numad():
        words.append(
            f"numad runs (process {pid}) and may bind the VM elsewhere: exclude the VM by numad -x, or end numad by "
            "numad -i 0"
        )
    return words


@contextlib.contextmanager
def balancing_paused(path: Path = BALANCING) -> Iterator[None]:
    """Turn the kernel's NUMA balancing off for a while, and then back on if it was on.

    :raise RefusedError: ``no-privilege``.
    """
    before = path.read_text().strip() if path.exists() else "0"
    try:
        if before != "0":
            path.write_text("0")
        yield
    except PermissionError as error:
        raise RefusedError("no-privilege", f"cannot write to {path}: pausing NUMA balancing takes root") from error
    finally:
        if before != "0":
            with contextlib.suppress(PermissionError):
                path.write_text(before)
