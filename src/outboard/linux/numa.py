"""move_pages(2), mbind(2) and sysfs: on which node memory is or shall be, and a thread runs."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux.libc import libc, syscall

SYS_mbind, SYS_move_pages = 237, 279
MPOL_BIND = 2
_NODES = Path("/sys/devices/system/node")
_PROCESSOR = 36
"""Of the fields of /proc/PID/task/TID/stat that follow the name: processor, where it last ran."""


@cache
def several_nodes() -> bool:
    """Whether this machine has more than one node with memory."""
    try:
        online = (_NODES / "has_memory").read_text().strip()
    except OSError:
        return False
    return "-" in online or "," in online


def nodes_of_pages(pid: int, addresses: NDArray[np.int64]) -> NDArray[np.int32]:
    """The node of the memory at each address of a process; a negated errno where nothing is mapped.

    :raise KernelError: ESRCH: it has ended; EPERM; ENOSYS: the kernel has no NUMA.
    """
    pages = np.ascontiguousarray(addresses, dtype=np.int64)
    found: NDArray[np.int32] = np.empty(pages.size, dtype=np.int32)
    arguments = (pid, pages.size, pages.ctypes.data, 0, found.ctypes.data, 0)
    if libc.syscall(ctypes.c_long(SYS_move_pages), *(ctypes.c_long(one) for one in arguments)) < 0:
        raise KernelError(f"move_pages of process {pid}", ctypes.get_errno())
    return found


def bind(address: int, length: int, node: int) -> None:
    """Have memory of this process, not touched yet, come from one node only.

    :raise KernelError: EINVAL: the node has no memory, or the cpuset does not permit it; ENOSYS: no NUMA.
    """
    words = node // 64 + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // 64] = 1 << node % 64
    # The kernel takes one bit less than it is told.
    syscall(
        f"mbind of {length} bytes to node {node}",
        *(SYS_mbind, address, length, MPOL_BIND, ctypes.addressof(mask), words * 64 + 1, 0),
    )


def node_of_thread(pid: int, tid: int) -> int:
    """The node that a thread last ran on; -1 where that cannot be told.

    :raise KernelError: it has ended.
    """
    try:
        text = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
    except OSError as error:
        raise KernelError(f"read of /proc/{pid}/task/{tid}/stat", error.errno or 0) from error
    processor = int(text.rpartition(")")[2].split()[_PROCESSOR])
    for node in Path(f"/sys/devices/system/cpu/cpu{processor}").glob("node[0-9]*"):
        return int(node.name.removeprefix("node"))
    return -1
