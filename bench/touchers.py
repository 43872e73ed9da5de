"""The process of touch.c, which touches its memory and says how long that took."""

from __future__ import annotations

import subprocess
from pathlib import Path

from outboard.errors import OutboardError


class Toucher:
    """bench/touch.c, compiled and running."""

    def __init__(self, directory: Path, mebibytes: int, kind: str = "memfd") -> None:
        self.pages = mebibytes << 8
        program = directory / "touch"
        subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("touch.c")], check=True)
        self._process = subprocess.Popen(
            [program, str(mebibytes), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def touch(self, order: str) -> tuple[float, float, float]:
        """Touch every page; seconds in all, and the median and 99th percentile of one in microseconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        total, took, p50, p99 = (int(word) for word in self._process.stdout.readline().split())
        if total != self.pages * (self.pages + 1) // 2:
            raise OutboardError("a page did not come back as it went")
        return took / 1e9, p50 / 1e3, p99 / 1e3

    def read_ns(self) -> float:
        """Read all over it at random; nanoseconds a word."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("m\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline().split()[1]) / 8e6

    def close(self) -> None:
        """End it."""
        with self._process:
            self._process.kill()
