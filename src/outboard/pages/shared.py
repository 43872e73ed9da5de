"""Arrays over shared memory: what the processes of one engine tell one another about pages without a message, and, over
a file, what an engine tells its successor.

A byte is the unit: processors store and load bytes whole, so that a reader sees the old value or the new one. Where two
processes want the same byte and one shall have it, :func:`claim` exchanges it in one instruction: no lock, no wait.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import DTypeLike, NDArray

from outboard.errors import KernelError, OutboardError


def shared_array(length: int, dtype: DTypeLike) -> NDArray[Any]:
    """Make an array of ``length`` zeros that the processes forked afterwards share with this one."""
    kind: np.dtype[Any] = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, length * kind.itemsize)), dtype=kind, count=length)


def file_array(path: Path, length: int, dtype: DTypeLike) -> NDArray[Any]:
    """Map an array of ``length`` from a file, zeros if it is not there yet; what is written survives the writer.

    :raise OutboardError: the file is there and holds another number.
    :raise KernelError: it cannot be made or mapped.
    """
    kind: np.dtype[Any] = np.dtype(dtype)
    size = length * kind.itemsize
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            there = os.fstat(fd).st_size
            if there not in (0, size):
                raise OutboardError(
                    f"{path} holds {there // kind.itemsize} entries, not {length}; remove it if nothing in it is needed"
                )
            os.ftruncate(fd, size)
            return np.frombuffer(mmap.mmap(fd, size), dtype=kind, count=length)
        finally:
            os.close(fd)
    except OSError as error:
        raise KernelError(f"map of {path}", error.errno or errno.EIO) from error


@intrinsic
def _exchange(typing_context: Any, array: Any, index: Any, value: Any) -> Any:  # noqa: ARG001  # numba's signature
    """Put ``value`` at ``array[index]`` and return what was there, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(context, builder, kind, made, [arguments[1]], wraparound=False)  # type: ignore[no-untyped-call]
        return builder.atomic_rmw("xchg", place, arguments[2], "seq_cst")

    return types.uint8(array, types.int64, types.uint8), generate


@intrinsic
def publish(typing_context: Any, array: Any, index: Any, value: Any) -> Any:  # noqa: ARG001  # numba's signature
    """Put ``value`` at ``array[index]``, of int64, so that whoever sees it sees all that was stored before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, arguments[0])
        place = cgutils.get_item_pointer(context, builder, kind, made, [arguments[1]], wraparound=False)  # type: ignore[no-untyped-call]
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@njit("void(uint8[::1], int64, boolean[::1])", cache=True, nogil=True)
def _claim(flags: NDArray[np.uint8], first: int, out: NDArray[np.bool_]) -> None:
    for index in range(out.shape[0]):
        out[index] = _exchange(flags, first + index, np.uint8(1)) == 0  # type: ignore[call-arg]  # numba passes one


@njit("boolean(uint8[::1], int64)", cache=True, nogil=True)
def claim_one(flags: NDArray[np.uint8], index: int) -> bool:
    """:func:`claim` for a single flag, where every microsecond counts."""
    return _exchange(flags, index, np.uint8(1)) == 0  # type: ignore[call-arg]  # numba passes one


@njit("void(uint8[::1], int64)", cache=True, nogil=True)
def release_one(flags: NDArray[np.uint8], index: int) -> None:
    """Set a flag to 0 in one instruction, after everything that was done before: who claims it next sees that."""
    _exchange(flags, index, np.uint8(0))  # type: ignore[call-arg]  # numba passes one


def claim(flags: NDArray[np.uint8], first: int, count: int) -> NDArray[np.bool_]:
    """Set ``flags[first : first + count]`` to 1, and say of each whether it was us who did.

    Of any number of processes that claim a flag, exactly one is told so.
    """
    out = np.empty(count, dtype=np.bool_)
    _claim(flags, first, out)
    return out
