"""Where memory is, asked of this process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np
import pytest

from outboard.errors import KernelError
from outboard.linux import numa


def test_a_page_is_on_a_node_and_one_that_is_not_there_on_none() -> None:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        found = numa.nodes_of_pages(os.getpid(), np.array([address, address + mmap.PAGESIZE], dtype=np.int64))
        del view
    assert found[0] >= 0
    assert found[1] == -errno.ENOENT


def test_a_thread_runs_on_a_node() -> None:
    node = numa.node_of_thread(os.getpid(), os.getpid())
    assert node >= -1
    if not numa.several_nodes():
        assert node in (-1, 0)
    with pytest.raises(KernelError, match="stat"):
        numa.node_of_thread(2**22 + 1, 1)
    with pytest.raises(KernelError, match="move_pages"):
        numa.nodes_of_pages(2**22 + 1, np.array([0], dtype=np.int64))


def test_memory_is_bound_to_a_node_and_not_to_one_that_is_not_there() -> None:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        numa.bind(address, 2 * mmap.PAGESIZE, 0)
        memory[0] = 1
        assert numa.nodes_of_pages(os.getpid(), np.array([address], dtype=np.int64))[0] == 0
        with pytest.raises(KernelError, match="mbind of 4096 bytes to node 1000"):
            numa.bind(address, mmap.PAGESIZE, 1000)
        del view


def test_pages_are_moved_within_their_node_and_not_to_one_that_is_not_there() -> None:
    with mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[0] = 1
        view = ctypes.c_char.from_buffer(memory)
        addresses = np.array([ctypes.addressof(view), ctypes.addressof(view) + mmap.PAGESIZE], dtype=np.int64)
        node = int(numa.nodes_of_pages(os.getpid(), addresses)[0])
        assert numa.move_pages(os.getpid(), addresses, node).tolist() == [node, -errno.ENOENT]
        with pytest.raises(KernelError, match=r"move_pages of 2 pages of process \d+ to node 1000"):
            numa.move_pages(os.getpid(), addresses, 1000)
        del view
    assert numa.migrate_pages(os.getpid(), node, node) == 0
    with pytest.raises(KernelError, match="migrate_pages"):
        numa.migrate_pages(os.getpid(), 0, 1000)
