"""Pressure stall information, Documentation/accounting/psi.rst: for how long tasks waited for memory."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path

from outboard.errors import KernelError

MEMORY = Path("/proc/pressure/memory")


def why_not(path: Path = MEMORY) -> str | None:
    """Why the kernel does not tell of pressure; None: it does."""
    try:
        path.read_text()
    except FileNotFoundError:
        return "the kernel was built without CONFIG_PSI"
    except OSError as error:
        # EOPNOTSUPP is how a kernel that has it, and has been told not to look, answers.
        return f"{path}: {os.strerror(error.errno or 0)}; start the kernel with psi=1"
    return None


def stalled_us(path: Path = MEMORY) -> tuple[int, int]:
    """For how long some task, and for how long every task, has waited for memory since the host was started, in us.

    :raise KernelError: the kernel does not tell.
    """
    totals = {kind: int(told["total"]) for kind, told in _read(path).items()}
    return totals["some"], totals.get("full", 0)


def stalled_share(path: Path = MEMORY) -> float:
    """For how many per cent of the last 10 s some task has waited for memory.

    :raise KernelError: the kernel does not tell.
    """
    return float(_read(path)["some"]["avg10"])


def _read(path: Path) -> dict[str, dict[str, str]]:
    """What the kernel tells, by ``some`` and ``full``."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise KernelError(f"read of {path}", error.errno or 0) from error
    return {kind: dict(word.split("=") for word in words) for kind, *words in lines}


class Trigger:
    """Tells when tasks waited for ``stall_us`` within ``window_us``; a context manager.

    A window is 500 ms to 10 s, and without CAP_SYS_RESOURCE a multiple of 2 s.

    :raise KernelError: EINVAL: no such times; EPERM; ENOENT, EOPNOTSUPP: there is no such pressure.

    Synchronization: one thread.
    """

    def __init__(self, stall_us: int, window_us: int, path: Path = MEMORY) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(self._fd, f"some {stall_us} {window_us}\0".encode())
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise KernelError(f"trigger of {stall_us} us in {window_us} us on {path}", error.errno or 0) from error
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def wait(self, seconds: float) -> bool:
        """Wait for the pressure; whether it came within ``seconds``.

        :raise KernelError: the group whose pressure it was is gone.
        """
        for _, events in self._poll.poll(seconds * 1000):
            if events & select.POLLERR:
                raise KernelError("poll of a pressure trigger", errno.ENODEV)
            return True
        return False

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Trigger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
