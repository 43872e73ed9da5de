"""Targets whose accesses are known, and what is asked of every target of bench mrc."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .mattson import misses


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a target is: touches begun so far, the clock and its processor time in seconds."""

    touches: int
    clock: float
    cpu: float


class Target(Protocol):
    """A process ``pid`` that touches ``touched`` pages of its shared memory over and over."""

    pid: int
    touched: int

    def mark(self) -> Mark:
        """Where it is now."""
        ...

    def misses(self, began: Mark, ended: Mark, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The truth: how many touches between two marks miss in an LRU memory of each size, in pages."""
        ...


@cache
def _program() -> Path:
    directory = tempfile.mkdtemp(prefix="outboard-bench-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = Path(directory) / "mrc_target"
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("mrc_target.c")], check=True)
    return program


class KnownTarget:
    """The target of mrc_target.c, going through ``sequence`` over and over."""

    def __init__(self, sequence: NDArray[np.int32], pages: int, work: int) -> None:
        self._sequence = sequence
        self.touched = pages
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="outboard-bench-") as file:
            sequence.tofile(file.name)
            self._process = subprocess.Popen(
                [_program(), file.name, str(pages), str(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            self.pid = self._process.pid
            self._line()

    def _line(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def mark(self) -> Mark:
        """Where it is now."""
        assert self._process.stdin is not None
        self._process.stdin.write("?\n")
        touches, clock, cpu = (int(word) for word in self._line())
        return Mark(touches, clock / 1e9, cpu / 1e9)

    def misses(self, began: Mark, ended: Mark, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many touches between two marks miss in an LRU memory of each size."""
        return misses(np.resize(self._sequence, ended.touches), self.touched, began.touches, sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._process.kill()
        self._process.communicate()
