"""The process of stalls.c, which works and knows when it was held up."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Work:
    """What got done: steps a second, the least in ten milliseconds as a share of the median, the longest wait in ms."""

    rate: float
    worst: float
    longest: float


def compiled(directory: Path) -> Path:
    """The program."""
    program = directory / "stalls"
    subprocess.run(["gcc", "-O2", "-pthread", "-o", program, Path(__file__).with_name("stalls.c")], check=True)
    return program


class Staller:
    """One that runs.

    :param kind: of its memory, ``memfd``, ``thp`` or ``hugetlb``; :param rate: pages a second that it writes to.
    :param writer: have a second thread that does nothing but write.
    """

    def __init__(self, program: Path, kind: str, mebibytes: int, rate: int, *, writer: bool = False) -> None:
        arguments = [str(program), kind, str(mebibytes), str(rate), *(["writer"] if writer else [])]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.worker, self.writer = (int(tid) for tid in self._line().split()[1:])

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _ask(self, order: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._line()

    def begin(self) -> None:
        """Measure from now on."""
        self._ask("b")

    def end(self) -> Work:
        """What it has done since."""
        steps, seconds, longest, worst, median = (float(word) for word in self._ask("e").split())
        return Work(steps / seconds, worst / max(1, median), longest / 1e6)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
