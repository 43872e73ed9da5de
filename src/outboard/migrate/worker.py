"""Workers: the processes of one engine that sit in system calls while the engine's main process steers.

A worker is forked, so that it shares the engine's arrays, streams and userfaultfd. It dies with its engine
(PR_SET_PDEATHSIG) and reports its end, in words, over a datagram pair that also carries its orders.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from outboard.errors import OutboardError, UnreachableError, error_of
from outboard.linux import pidfd, prctl, sched

_MOST = 64 * 1024
_ENDED = b"\0ended\0"
_FAILED = b"\0failed\0"


class Worker:
    """A forked process that runs ``body`` with its end of the pair.

    :param name: shown in process listings and errors.
    :param urgent: ask for a real-time priority, so that a fault is served before anything that merely computes.

    Synchronization: the process that made it uses it. Make it while no other thread runs: a fork copies locks as they
    stand.
    """

    def __init__(self, name: str, body: Callable[[socket.socket], None], *, urgent: bool = False) -> None:
        self.name = name
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        engine = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(name, engine, body, theirs, self.link, urgent=urgent)
        theirs.close()
        self._pidfd = pidfd.open(self.pid)
        self._outcome: bytes | None = None

    def tell(self, order: bytes) -> None:
        """Send one order.

        :raise OutboardError: the worker has ended: its own error, in its words.
        """
        try:
            self.link.send(order)
        except OSError as error:
            raise self._error() or UnreachableError(f"{self.name} has ended: {error}") from error

    def fileno(self) -> int:
        """Readable when the worker has said something or ended."""
        return self.link.fileno()

    def hear(self, timeout: float | None = None) -> bytes | None:
        """The next report; None when ``timeout`` seconds passed without one.

        :raise OutboardError: the worker has ended: its own error, in its words.
        """
        if not select.select([self.link], [], [], timeout)[0]:
            return None
        report = self.link.recv(_MOST)
        if not report or report.startswith((_ENDED, _FAILED)):
            self._outcome = report
            raise self._error() or UnreachableError(f"{self.name} ended without a word")
        return report

    def _error(self) -> OutboardError | None:
        if self._outcome is None:
            try:
                self.link.setblocking(False)
                while report := self.link.recv(_MOST):
                    if report.startswith((_ENDED, _FAILED)):
                        self._outcome = report
            except OSError:
                pass
        if self._outcome and self._outcome.startswith(_FAILED):
            told = self._outcome.removeprefix(_FAILED)
            return error_of(told[0], told[1:].decode(errors="replace"))
        return None

    def end(self) -> None:
        """Kill it, if it still runs, and reap it. Idempotent."""
        if self._pidfd < 0:
            return
        pidfd.send_signal(self._pidfd, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1
        self.link.close()

    def join(self) -> None:
        """Wait until it has ended by itself, and reap it."""
        select.select([self._pidfd], [], [])
        self.end()


def _become(
    name: str,
    engine: int,
    body: Callable[[socket.socket], None],
    link: socket.socket,
    other: socket.socket,
    *,
    urgent: bool,
) -> None:
    """Be the worker; never returns."""
    status = 1
    try:
        prctl.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != engine:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        other.close()
        prctl.set_name(name)
        if urgent:
            sched.prefer_this_process()
        else:
            sched.favour_this_process()
        # Collecting would touch, and so copy, every object shared with the engine.
        gc.disable()
        gc.freeze()
        body(link)
        link.send(_ENDED)
        status = 0
    except OutboardError as error:
        _say(link, str(error), error.exit_code)
    except BaseException:  # noqa: BLE001  # the last word of a process: whatever it was is reported, then it ends
        _say(link, f"{name}: {traceback.format_exc()}", OutboardError.exit_code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _say(link: socket.socket, words: str, exit_code: int) -> None:
    try:
        link.send(_FAILED + bytes([exit_code]) + words.encode()[: _MOST - len(_FAILED) - 1])
    except OSError:
        # The engine is gone, and with it whoever would have listened.
        return
