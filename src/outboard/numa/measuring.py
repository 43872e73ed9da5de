"""The latency of memory as a processor sees it: chasing pointers, where each access must wait for the one before.

A buffer larger than every cache, bound to the node, holds one cycle through all of its cache lines in random order, so
that no prefetcher helps. A thread pinned to the processor follows it: time over steps is the latency. The median of
several stretches is taken, since whatever disturbs one makes it longer.

Loaded, the other processors of the node (or of the measured one, where the node has none) read a buffer of the same
node in order meanwhile, as fast as they can.
"""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.errors import OutboardError
from outboard.linux import numa
from outboard.numa.topology import Latencies, Node, Topology

_LINE = 8
"""64-bit words in a cache line."""
_PAGE = 4096
LEAST_BYTES = 64 << 20
_STRETCHES, _STEPS = 7, 40_000
_STREAMERS = 16
"""As many as fill the bandwidth of a node."""
_CHUNK = 1 << 17

_WORDS = types.int64[::1]


@njit(types.int64(_WORDS, types.int64, types.int64), cache=True, nogil=True)
def _chase(following: NDArray[np.int64], start: int, steps: int) -> int:
    at = start
    for _ in range(steps):
        at = following[at]
    return at


@njit(types.int64(_WORDS, types.int64, types.int64), cache=True, nogil=True)
def _stream(words: NDArray[np.int64], first: int, last: int) -> int:
    total = 0
    for at in range(first, last):
        total += words[at]
    return total


class _Buffer:
    """Anonymous memory of one node, a cycle through its cache lines in it."""

    def __init__(self, node: int, size: int, random: np.random.Generator, *, bound: bool) -> None:
        try:
            self._map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OutboardError(f"cannot measure: no {size} bytes of memory to be had: {error.strerror}") from error
        # Small pages add a walk of the page table to each access; a kernel may know no others.
        with suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.words = np.frombuffer(self._map, dtype=np.int64)
        address = self.words.ctypes.data
        if bound:
            numa.bind(address, size, node)
        order = random.permutation(self.words.size // _LINE) * _LINE
        self.words[order] = np.roll(order, -1)
        if bound:
            looked = address + np.arange(0, size, max(_PAGE, size // 64), dtype=np.int64)
            strayed = set(numa.nodes_of_pages(os.getpid(), looked).tolist()) - {node}
            if strayed:
                raise OutboardError(
                    f"cannot measure node {node}: memory bound to it came from {sorted(strayed)}; "
                    "see whether the node has free memory"
                )

    def close(self) -> None:
        del self.words
        self._map.close()


@contextmanager
def _streaming(buffer: _Buffer, processors: list[int]) -> Iterator[None]:
    ended = threading.Event()

    def stream(processor: int, at: int) -> None:
        os.sched_setaffinity(0, {processor})
        size = buffer.words.size
        while not ended.is_set():
            _stream(buffer.words, at, min(size, at + _CHUNK))
            at = (at + _CHUNK) % size

    threads = [
        threading.Thread(target=stream, args=(one, buffer.words.size // len(processors) * index), daemon=True)
        for index, one in enumerate(processors)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _latency(buffer: _Buffer, processor: int) -> float:
    """ns of an access; the thread that asks is pinned meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        at, taken = _chase(buffer.words, 0, _STEPS // 10), []
        for _ in range(_STRETCHES):
            began = time.perf_counter_ns()
            at = _chase(buffer.words, at, _STEPS)
            taken.append((time.perf_counter_ns() - began) / _STEPS)
        return round(statistics.median(taken), 1)
    finally:
        os.sched_setaffinity(0, before)


def buffer_bytes(topology: Topology) -> int:
    """A buffer of which no cache holds more than a fourth."""
    largest = max((cache.size for cache in topology.caches), default=0)
    return max(LEAST_BYTES, -(-4 * largest // (1 << 21)) * (1 << 21))


def _streamers(topology: Topology, node: Node, processor: int, permitted: set[int]) -> list[int]:
    """Who loads a node while a processor is measured: others, on cores of their own where there are any."""
    core = {one.number: one.core for one in topology.processors}
    near = node.processors or next(one.processors for one in topology.nodes if processor in one.processors)
    others = [one for one in near if one in permitted and core[one] != core[processor]]
    others = others or [one for one in core if one in permitted and core[one] != core[processor]]
    return others[:_STREAMERS]


def measure(
    topology: Topology,
    random: np.random.Generator,
    size: int = 0,
    progress: Callable[[int, int], None] = lambda _node, _processor: None,
) -> Topology:
    """The topology with its latencies, measured here and now from each processor to each node.

    :param size: bytes of a buffer; 0: as the caches need.
    :raise OutboardError: a processor or a node is not permitted to this process, or has no free memory.
    :raise KernelError: memory cannot be bound to a node.
    """
    permitted = os.sched_getaffinity(0)
    missing = [one.number for one in topology.processors if one.number not in permitted]
    if missing:
        raise OutboardError(f"cannot measure from processors {missing}: this process may not run there; see its cpuset")
    shape = (len(topology.processors), len(topology.nodes))
    idle, loaded = np.zeros(shape), np.zeros(shape)
    for column, node in enumerate(topology.nodes):
        buffer = _Buffer(node.number, size or buffer_bytes(topology), random, bound=shape[1] > 1)
        try:
            for row, processor in enumerate(topology.processors):
                progress(node.number, processor.number)
                idle[row, column] = _latency(buffer, processor.number)
                streamers = _streamers(topology, node, processor.number, permitted)
                with _streaming(buffer, streamers):
                    loaded[row, column] = _latency(buffer, processor.number)
        finally:
            buffer.close()
    found = Latencies(
        [one.number for one in topology.processors],
        [node.number for node in topology.nodes],
        idle.tolist(),
        loaded.tolist(),
    )
    return msgspec.structs.replace(topology, latencies=found)
