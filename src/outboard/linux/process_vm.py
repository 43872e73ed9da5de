"""process_vm_readv(2): another process's memory, read from outside.

The kernel reads as if the process itself did: what its page tables lack and its files hold is mapped there first.
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from outboard.errors import KernelError
from outboard.linux.libc import syscall

SYS_process_vm_readv = 310
_MOST = 1024
"""UIO_MAXIOV."""


def touch(pid: int, addresses: NDArray[np.int64]) -> int:
    """Have memory mapped in a process, by reading a byte at each address; how many could be read.

    What has no memory yet gets some: ask only for what is known to have content.

    :raise KernelError: ESRCH: it has ended; EPERM.
    """
    remote: NDArray[np.int64] = np.ones((len(addresses), 2), dtype=np.int64)
    remote[:, 0] = addresses
    room: NDArray[np.uint8] = np.empty(_MOST, dtype=np.uint8)
    local: NDArray[np.int64] = np.array([room.ctypes.data, _MOST], dtype=np.int64)
    at = done = 0
    while at < len(remote):
        part = remote[at : at + _MOST]
        local[1] = len(part)
        try:
            step = syscall(
                f"process_vm_readv of process {pid}",
                *(SYS_process_vm_readv, pid, local.ctypes.data, 1, part.ctypes.data, len(part), 0),
            )
        except KernelError as error:
            if error.errno != errno.EFAULT:
                raise
            step = 0
        done += step
        # It ends before the first that cannot be read.
        at += step if step == len(part) else step + 1
    return done
