"""Arrays over anonymous shared memory: what the processes of one engine tell one another about pages without a message.

A byte is the unit: processors store and load bytes whole, so that a reader sees the old value or the new one.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def shared_array(length: int, dtype: DTypeLike) -> NDArray[Any]:
    """Make an array of ``length`` zeros that the processes forked afterwards share with this one."""
    kind: np.dtype[Any] = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, length * kind.itemsize)), dtype=kind, count=length)
