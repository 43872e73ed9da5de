"""The VMs' users: a process that loads memcached in every VM over TCP, checks each answer and counts.

``python -m demo.client --target NAME=ADDRESS:PORT ...`` prints ``ready`` when every key is stored, works until its
standard input ends and then prints its record, one JSON object.

The load is closed: each connection has one request outstanding and sends the next when the answer is there, so the
client asks no more than the VMs can answer, and its own need for the processor is bounded by theirs. One request in
ten is a set, the others are gets. A connection owns its keys, and a value is derived from its key and the number of
times it was set: whatever else comes back, an old value and no value included, is recorded as wrong. A connection
that ends is recorded as broken and never opened again.

Only the standard library, one thread, epoll(7).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import select
import socket
import sys
import time
from collections import defaultdict

BUCKET_S = 0.1
VALUE_BYTES = 400
KEYS = 64
SET_SHARE = 0.1
TIMEOUT_S = 30.0


def value_of(key: str, version: int) -> bytes:
    """The bytes that *key* holds after its *version*-th set; :data:`VALUE_BYTES` long."""
    stem = f"{key} is at {version:09d}; ".encode()
    return (stem * (VALUE_BYTES // len(stem) + 1))[:VALUE_BYTES]


class Connection:
    """One persistent connection with one request outstanding."""

    def __init__(self, vm: str, number: int, address: tuple[str, int]) -> None:
        self.vm = vm
        self.keys = [f"{vm}-{number}-{index}" for index in range(KEYS)]
        self.versions = [0] * KEYS
        self.socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.random = random.Random(f"{vm} {number}")  # noqa: S311 (the same requests in every run)
        self.expected = b""
        self.received = b""
        self.asked = 0.0

    def preload(self) -> None:
        """Store every key once, waiting for each answer."""
        for index in range(KEYS):
            self._store(index)
            while len(self.received) < len(self.expected):
                self.received += self.socket.recv(4096) or self._closed()
            if self.received != self.expected:
                raise ConnectionError(f"{self.vm} answered a set with {self.received!r}")
        self.socket.setblocking(False)

    def _closed(self) -> bytes:
        raise ConnectionError(f"{self.vm} closed the connection")

    def _store(self, index: int) -> None:
        self.versions[index] += 1
        key = self.keys[index]
        value = value_of(key, self.versions[index])
        self._ask(b"set %s 0 0 %d\r\n%s\r\n" % (key.encode(), VALUE_BYTES, value), b"STORED\r\n")

    def _ask(self, request: bytes, expected: bytes) -> None:
        self.received = b""
        self.expected = expected
        self.asked = time.monotonic()
        self.socket.send(request)  # far smaller than an idle socket's buffer

    def next(self) -> None:
        """Send the next request."""
        index = self.random.randrange(KEYS)
        if self.random.random() < SET_SHARE:
            self._store(index)
        else:
            key = self.keys[index].encode()
            value = value_of(self.keys[index], self.versions[index])
            self._ask(b"get %s\r\n" % key, b"VALUE %s 0 %d\r\n%s\r\nEND\r\n" % (key, VALUE_BYTES, value))

    def answered(self) -> bool:
        """Whether the whole answer is there, after taking what has arrived.

        :raise ConnectionError: the connection ended.
        :raise ValueError: the answer is not the expected one.
        """
        self.received += self.socket.recv(4096) or self._closed()
        if not self.expected.startswith(self.received):
            raise ValueError(f"{self.vm}: expected {self.expected[:60]!r}..., got {self.received[:60]!r}...")
        return len(self.received) == len(self.expected)


class Client:
    """All connections, and the record: per VM the answers and the longest wait in each 100 ms."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections
        self.ops: dict[str, defaultdict[int, int]] = {}
        self.waits: dict[str, defaultdict[int, float]] = {}
        for connection in connections:
            self.ops.setdefault(connection.vm, defaultdict(int))
            self.waits.setdefault(connection.vm, defaultdict(float))
        self.broken: list[str] = []
        self.wrong: list[str] = []

    def work(self, until_readable: int) -> None:
        """Ask and count until the descriptor *until_readable* has something to read."""
        epoll = select.epoll()
        epoll.register(until_readable, select.EPOLLIN)
        by_fd = {connection.socket.fileno(): connection for connection in self.connections}
        for fd, connection in by_fd.items():
            epoll.register(fd, select.EPOLLIN)
            connection.next()
        while True:
            events = epoll.poll()
            now = time.monotonic()
            bucket = int(now / BUCKET_S)
            for fd, _ in events:
                if fd == until_readable:
                    return
                connection = by_fd[fd]
                try:
                    if not connection.answered():
                        continue
                    self.ops[connection.vm][bucket] += 1
                    waits = self.waits[connection.vm]
                    waits[bucket] = max(waits[bucket], now - connection.asked)
                    connection.next()
                except ValueError as error:
                    self.wrong.append(str(error))
                    epoll.unregister(fd)
                except OSError as error:
                    self.broken.append(f"{connection.vm}: {error}")
                    epoll.unregister(fd)

    def record(self) -> dict[str, object]:
        """What happened, as demo.load.Traffic reads it."""
        buckets = [bucket for counts in self.ops.values() for bucket in counts] or [0]
        first, last = min(buckets), max(buckets)
        span = range(first, last)  # the last bucket is not over
        return {
            "origin_s": first * BUCKET_S,
            "bucket_s": BUCKET_S,
            "ops": {vm: [counts[bucket] for bucket in span] for vm, counts in self.ops.items()},
            "longest_wait_ms": {vm: [1e3 * waits[bucket] for bucket in span] for vm, waits in self.waits.items()},
            "connections": len(self.connections),
            "broken": self.broken,
            "wrong": self.wrong,
        }


def main() -> None:
    """Run the client as its command line says."""
    parser = argparse.ArgumentParser(prog="demo.client")
    parser.add_argument("--target", action="append", required=True, metavar="NAME=ADDRESS:PORT")
    parser.add_argument("--connections", type=int, default=4, help="to each target")
    options = parser.parse_args()
    connections = []
    for target in options.target:
        vm, _, place = target.partition("=")
        address, _, port = place.rpartition(":")
        connections += [Connection(vm, number, (address, int(port))) for number in range(options.connections)]
    for connection in connections:
        connection.preload()
    client = Client(connections)
    print("ready", flush=True)
    gc.disable()
    began, used = time.monotonic(), time.process_time()
    client.work(sys.stdin.fileno())
    elapsed, cpu = time.monotonic() - began, time.process_time() - used
    print(json.dumps(client.record() | {"elapsed_s": elapsed, "cpu_s": cpu}), flush=True)


if __name__ == "__main__":
    main()
