"""The C target of target.c, compiled once a session and spoken to over pipes."""

from __future__ import annotations

import atexit
import os
import select
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

_HERE = Path(__file__).parent


@cache
def compile_c(source: str, *flags: str) -> Path:
    """Compile a C file that lies beside this one; the program's path."""
    directory = tempfile.mkdtemp(prefix="outboard-test-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = Path(directory) / Path(source).stem
    subprocess.run(["gcc", "-O1", "-Wall", "-pthread", *flags, "-o", program, _HERE / source], check=True)
    return program


class Target:
    """A running target; ``start`` and ``size`` are its region's, in bytes."""

    def __init__(self, kind: str = "memfd", mebibytes: int = 8, threads: int = 3, program: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [program or compile_c("target.c"), kind, str(mebibytes), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        _, start, size = self._line().split()
        self.start, self.size = int(start, 16), int(size)
        self.pages = self.size // 4096
        self.page_size = 2 << 20 if kind == "hugetlb" else 4096

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self, order: str) -> None:
        """Give an order without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def ask(self, order: str) -> str:
        """Give an order; its answer."""
        self.say(order)
        return self._line()

    def answer(self) -> str:
        """The answer to an order given by :meth:`say`."""
        return self._line()

    def ended(self) -> int:
        """Wait for its end; the exit status, negated signal."""
        return self._process.wait(10)

    def waits(self) -> bool:
        """Whether an answer fails to come within a moment."""
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], 0.05)[0]

    def at(self, page: int) -> int:
        """The address of a page."""
        return self.start + page * 4096

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                os.sched_yield()
