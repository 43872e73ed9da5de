"""move_pages(2), migrate_pages(2), mbind(2) and sysfs: on which node memory is or shall be, and a thread runs."""

from __future__ import annotations

import ctypes
import errno
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux.libc import libc, syscall

SYS_mbind, SYS_migrate_pages, SYS_move_pages = 237, 256, 279
MPOL_BIND = 2
MPOL_MF_MOVE = 2
NOT_TRIED = -errno.EAGAIN
"""The status of a page that the kernel did not come to."""
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


def move_pages(pid: int, addresses: NDArray[np.int64], node: int) -> NDArray[np.int32]:
    """Move a process's memory to a node, page by page; whoever touches a page meanwhile waits.

    A page that another process maps too stays (EACCES), and so does what is not in the page tables (ENOENT).

    :return: for each address the node that its page is on now, or a negated errno; NOT_TRIED: a page before it failed.
    :raise KernelError: ENODEV: there is no such node; EACCES: the cpuset does not permit it; ESRCH; EPERM; ENOSYS.
    """
    pages = np.ascontiguousarray(addresses, dtype=np.int64)
    nodes: NDArray[np.int32] = np.full(pages.size, node, dtype=np.int32)
    found: NDArray[np.int32] = np.full(pages.size, NOT_TRIED, dtype=np.int32)
    where = (pages.ctypes.data, nodes.ctypes.data, found.ctypes.data)
    syscall(
        f"move_pages of {pages.size} pages of process {pid} to node {node}",
        *(SYS_move_pages, pid, pages.size, *where, MPOL_MF_MOVE),
    )
    return found


def _mask(node: int, room: int = 0) -> ctypes.Array[ctypes.c_ulong]:
    """A node mask with one node in it, and room for another."""
    mask = (ctypes.c_ulong * (max(node, room) // 64 + 1))()
    mask[node // 64] = 1 << node % 64
    return mask


def migrate_pages(pid: int, origin: int, node: int) -> int:
    """Move all that a process has on one node to another, in the order of its addresses; how many pages could not be.

    :raise KernelError: EINVAL: there is no such node; EPERM; ESRCH; ENOSYS: the kernel has no NUMA.
    """
    old, new = _mask(origin, node), _mask(node, origin)
    # The kernel takes one bit less than it is told.
    most = len(old) * 64 + 1
    return syscall(
        f"migrate_pages of process {pid} from node {origin} to node {node}",
        *(SYS_migrate_pages, pid, most, ctypes.addressof(old), ctypes.addressof(new)),
    )


def bind(address: int, length: int, node: int) -> None:
    """Have memory of this process, not touched yet, come from one node only.

    :raise KernelError: EINVAL: the node has no memory, or the cpuset does not permit it; ENOSYS: no NUMA.
    """
    mask = _mask(node)
    # The kernel takes one bit less than it is told.
    syscall(
        f"mbind of {length} bytes to node {node}",
        *(SYS_mbind, address, length, MPOL_BIND, ctypes.addressof(mask), len(mask) * 64 + 1, 0),
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
