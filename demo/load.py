"""The client as the demo holds it: a process in the client's namespace, and the record that it hands back."""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from .hosts import Namespace, TestbedError


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the client did and saw.

    :ivar origin_s: CLOCK_MONOTONIC at the first bucket's begin.
    :ivar ops: right answers per VM and bucket.
    :ivar longest_wait_ms: the longest wait for an answer that arrived in that bucket.
    :ivar broken: connections that ended before the client did, one sentence each.
    :ivar wrong: answers with another value than the last one set, or none.
    :ivar cpu_s: processor time of the client itself.
    """

    origin_s: float
    bucket_s: float
    ops: dict[str, list[int]]
    longest_wait_ms: dict[str, list[float]]
    connections: int
    broken: list[str]
    wrong: list[str]
    elapsed_s: float
    cpu_s: float

    def total(self) -> NDArray[np.int64]:
        """Answers of all VMs together per bucket."""
        counts: NDArray[np.int64] = np.array(list(self.ops.values()), dtype=np.int64).sum(axis=0)
        return counts

    def count(self, counts: NDArray[np.int64], begin_s: float, end_s: float) -> float:
        """Answers between two moments of CLOCK_MONOTONIC; a bucket that is cut counts by the share inside."""
        starts = self.origin_s + self.bucket_s * np.arange(len(counts))
        inside = np.minimum(starts + self.bucket_s, end_s) - np.maximum(starts, begin_s)
        return float(np.sum(counts * np.clip(inside, 0.0, None)) / self.bucket_s)

    def rate(self, vm: str, begin_s: float, end_s: float) -> float:
        """Answers a second of one VM between two moments."""
        return self.count(np.array(self.ops[vm], dtype=np.int64), begin_s, end_s) / (end_s - begin_s)

    def wait_ms(self, vm: str, begin_s: float, end_s: float) -> float:
        """The longest wait for an answer that came between two moments."""
        first = int((begin_s - self.origin_s) / self.bucket_s)
        last = int((end_s - self.origin_s) / self.bucket_s) + 1
        return max(self.longest_wait_ms[vm][max(first, 0) : last], default=0.0)


class Load:
    """A running client; a context manager that ends it.

    :param targets: the address and port of memcached in each VM.
    """

    def __init__(self, namespace: Namespace, targets: dict[str, tuple[str, int]], connections: int = 4) -> None:
        command = [sys.executable, "-m", "demo.client", "--connections", str(connections)]
        for vm, (address, port) in targets.items():
            command += ["--target", f"{vm}={address}:{port}"]
        self._process = namespace.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self.close()
            raise TestbedError(f"the client could not reach {', '.join(targets)}; its own message is above")

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def finish(self) -> Traffic:
        """Tell the client to stop; returns its record.

        :raise TestbedError: it died meanwhile.
        """
        output, _ = self._process.communicate(timeout=60)
        if self._process.returncode:
            raise TestbedError(f"the client exited {self._process.returncode} before it was told to")
        return msgspec.json.decode(output, type=Traffic)

    def close(self) -> None:
        """End the client, whatever it does; idempotent."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
