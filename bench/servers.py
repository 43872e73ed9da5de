"""redis-server and memcached under load: targets of bench mrc whose truth is a run in which every access is traced.

A client asks for one key after the other, of a Zipf distribution, over a unix socket. For the truth, every page that is
mapped between two requests is counted as touched and zapped again; the pages go through Mattson's stack in that order.
Both runs are of one load, not of the very same requests. An access is a request, which touches some pages.

The programs are Debian's, unpacked beside the project and not installed. memcached keeps its items in a file on tmpfs
by an option of its own; redis-server's allocator is made to map its memory shared (shared.c).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from outboard.linux import cpuclock, pidfd, process_madvise
from outboard.linux.pagemap import Category, Pagemap
from outboard.linux.process_madvise import Advice
from outboard.linux.userfaultfd import Mode
from outboard.pages import PAGE_SIZE
from outboard.pages.shared import shared_array
from outboard.trace.accesses import PageTablesTrace
from outboard.vmm.clamp import Clamp
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_process

from .mattson import misses
from .targets import Mark

_DEBS = ("memcached", "redis-server", "redis-tools", "libjemalloc2", "liblua5.1-0", "liblzf1", "libhiredis0.14")
_UNPACKED = Path(__file__).parent.parent / ".build" / "servers"
_KEYS, _VALUE = 48_000, 1_000
_EXPONENT = 1.0
_CHUNK = 1 << 14
_WARM, _COUNTED = 40_000, 60_000
_START_S = 10.0
SERVERS = ("memcached", "redis")


@cache
def _programs() -> Path:
    """The root under which the servers are."""
    if not (_UNPACKED / "usr").exists():
        _UNPACKED.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "-qq", "download", *_DEBS], cwd=_UNPACKED, check=True, capture_output=True)
        for package in _UNPACKED.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, _UNPACKED], check=True)
    return _UNPACKED


def _command(kind: str, directory: Path) -> tuple[list[str | Path], dict[str, str]]:
    """How to start a server in ``directory``, and with what environment."""
    root, place = _programs(), directory / "socket"
    libraries = os.pathsep.join(map(str, (root / "usr/lib/x86_64-linux-gnu", root / "lib/x86_64-linux-gnu")))
    if kind == "memcached":
        memory: list[str | Path] = ["-e", directory / "memory", "-m", "128", "-t", "1", "-o", "no_lru_maintainer"]
        return [root / "usr/bin/memcached", "-u", "root", "-s", place, *memory], {"LD_LIBRARY_PATH": libraries}
    preload = directory / "shared.so"
    source = Path(__file__).with_name("shared.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", preload, source], check=True)
    quiet = ("--save", "", "--appendonly", "no", "--activerehashing", "no", "--loglevel", "warning")
    # What the allocator gives back to the kernel it expects to read as zeros, which shared memory does not.
    kept = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
    return [root / "usr/bin/redis-server", "--port", "0", "--unixsocket", place, "--dir", directory, *quiet], {
        "LD_LIBRARY_PATH": libraries,
        "LD_PRELOAD": str(preload),
        "MALLOC_CONF": kept,
    }


class _Client:
    """Speaks to a server of ``kind``; every answer has a length that is known."""

    def __init__(self, kind: str, path: Path) -> None:
        self._redis = kind == "redis"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.fspath(path))
        self._keys = [b"k%08d" % number for number in range(_KEYS)]
        if self._redis:
            self._keys = [b"$9\r\n" + key + b"\r\n" for key in self._keys]
        self._each = len(b"$%d\r\n" % _VALUE if self._redis else b"VALUE k00000000 0 %d\r\n" % _VALUE) + _VALUE + 2
        self._tail = 0 if self._redis else len(b"END\r\n")
        self._room = memoryview(bytearray(self._each + self._tail))

    def fill(self) -> None:
        """Store all keys."""
        value = b"v" * _VALUE
        for key in self._keys:
            if self._redis:
                self._socket.sendall(b"*3\r\n$3\r\nSET\r\n" + key + b"$%d\r\n" % _VALUE + value + b"\r\n")
                self._receive(len(b"+OK\r\n"))
            else:
                self._socket.sendall(b"set " + key + b" 0 0 %d\r\n" % _VALUE + value + b"\r\n")
                self._receive(len(b"STORED\r\n"))

    def get(self, number: int) -> None:
        """Ask for a key."""
        if self._redis:
            self._socket.sendall(b"*2\r\n$3\r\nGET\r\n" + self._keys[number])
        else:
            self._socket.sendall(b"get " + self._keys[number] + b"\r\n")
        self._receive(self._each + self._tail)

    def _receive(self, length: int) -> None:
        got = 0
        while got < length:
            count = self._socket.recv_into(self._room[got:length])
            assert count, "the server has closed the connection"
            got += count


def _requests(rng: np.random.Generator, order: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    weights = np.arange(1, _KEYS + 1) ** -_EXPONENT
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count))
    return order[np.minimum(ranks, _KEYS - 1)]


def _drive(kind: str, path: Path, seed: int, order: NDArray[np.int64], done: NDArray[np.int64]) -> None:
    client = _Client(kind, path)
    rng = np.random.default_rng(seed)
    while True:
        for number in _requests(rng, order, _CHUNK).tolist():
            client.get(number)
            done[0] += 1


@contextlib.contextmanager
def _server(kind: str) -> Iterator[tuple[int, Path]]:
    """A server that holds all keys: its process and where it listens."""
    directory = Path(tempfile.mkdtemp(prefix="outboard-bench-", dir="/dev/shm"))
    command, environment = _command(kind, directory)
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        path = directory / "socket"
        deadline = time.monotonic() + _START_S
        while not path.exists():
            assert process.poll() is None, f"{kind} did not start"
            assert time.monotonic() < deadline, f"{kind} does not listen"
            time.sleep(0.01)
        _Client(kind, path).fill()
        yield process.pid, path
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def _placed() -> NDArray[np.int64]:
    """Which key has each rank; the same in all runs."""
    return np.random.default_rng(0).permutation(_KEYS)


def _touched(guest: Guest, pagemap: Pagemap, process: int) -> NDArray[np.int64]:
    """The pages that are mapped, which they are no longer then."""
    pages, ranges = [], []
    for region in guest.regions:
        end = region.hva + region.pages * PAGE_SIZE
        for start, stop, _ in pagemap.scan(
            region.hva, end, required=Category.PRESENT, report=Category.PRESENT
        ).tolist():
            first = region.first + (start - region.hva) // PAGE_SIZE
            pages.append(np.arange(first, first + (stop - start) // PAGE_SIZE))
            ranges.append((start, stop - start))
    if not ranges:
        return np.empty(0, dtype=np.int64)
    process_madvise.advise(process, ranges, Advice.PAGEOUT)
    return np.concatenate(pages)


@cache
def truth(kind: str) -> tuple[NDArray[np.int64], int, int]:
    """Pages in the order of their accesses, where the counted ones begin, and how many requests those are."""
    rng = np.random.default_rng(1 << 20)
    with _server(kind) as (pid, path), attach_process(pid) as guest, Pagemap(pid) as pagemap:
        # Registered, so that the kernel maps no neighbours.
        clamp = Clamp.inject(guest, PageTablesTrace.features, Mode.WP, outlives_us=False)
        process = pidfd.open(pid)
        client = _Client(kind, path)
        requests = _requests(rng, _placed(), _WARM + _COUNTED).tolist()
        found = [_touched(guest, pagemap, process)]
        since = 0
        for index, number in enumerate(requests):
            if index == _WARM:
                since = sum(map(len, found))
            client.get(number)
            found.append(_touched(guest, pagemap, process))
        pidfd.close(process)
        clamp.release()
    return np.concatenate(found), since, _COUNTED


class ServerTarget:
    """A server under load; a touch is a request for a key."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        accesses, since, self._counted = truth(kind)
        _, dense = np.unique(accesses, return_inverse=True)
        self._accesses, self._pages, self._since = dense.astype(np.int32), int(dense.max()) + 1, since
        self.touched = len(np.unique(accesses[since:]))
        self._undo = contextlib.ExitStack()
        self.pid, path = self._undo.enter_context(_server(kind))
        self._clock = cpuclock.of(self.pid)
        self._done: NDArray[np.int64] = shared_array(1, np.int64)
        context = multiprocessing.get_context("fork")
        self._load = context.Process(target=_drive, args=(kind, path, seed, _placed(), self._done), daemon=True)
        self._load.start()

    def mark(self) -> Mark:
        """Where it is now."""
        return Mark(int(self._done[0]), time.monotonic(), cpuclock.read(self._clock) / 1e9)

    def misses(self, began: Mark, ended: Mark, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many of the requests between two marks miss in an LRU memory of each size."""
        found = misses(self._accesses, self._pages, self._since, sizes)
        return found * ((ended.touches - began.touches) / self._counted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._load.kill()
        self._load.join()
        self._undo.close()
