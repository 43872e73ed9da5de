"""The thread that serves a guest's faults: :func:`~outboard.pager.serving.serve`, and what it comes back for."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError
from outboard.linux import prctl, sched
from outboard.linux.libc import close
from outboard.linux.userfaultfd import EventKind
from outboard.pager.latency import Latencies, LatencyHistogram
from outboard.pager.serving import AT_ONCE, MESSAGE_WORDS, MOST_SPACES, serve
from outboard.pager.table import Count, Desk, Reason, State, Table
from outboard.pages import PAGE_SIZE
from outboard.pages.shared import shared_array

SPIN_NS = 30_000


@dataclass(frozen=True, slots=True)
class FaultStatistics:
    """Faults served so far, by how; ``latencies`` from the reading of a message to its answer.

    ``left`` waited for an eviction or a fetch, ``raced`` found their page there, ``damaged`` got a memory error.
    """

    pool: int
    file: int
    zero: int
    minor: int
    protected: int
    left: int
    raced: int
    again: int
    damaged: int
    disk: int
    snapshot: int
    latencies: Latencies


class FaultServer:
    """Serves the faults on ``table``'s pages that ``uffd`` tells of, and those of children that the guest forks.

    ``uffds`` (int32) are the live descriptors of ``spaces`` address spaces, the guest's own first.

    Synchronization: :meth:`start` and :meth:`stop` from one thread; the thread that serves runs without the GIL.
    """

    def __init__(self, table: Table, uffd: int) -> None:
        self._table = table
        self._histogram = LatencyHistogram()
        self._desk = Desk(
            messages=np.zeros(AT_ONCE * MESSAGE_WORDS, dtype=np.uint64),
            polled=np.zeros(MOST_SPACES + 1, dtype=np.uint64),
            retries=np.zeros((4 * AT_ONCE, 3), dtype=np.int64),
            staging=shared_array(PAGE_SIZE, np.uint8),
            room=np.zeros(5, dtype=np.int64),
            state=np.zeros(State.SIZE, dtype=np.int64),
            counts=np.zeros(Count.SIZE, dtype=np.int64),
            histogram=self._histogram.counts,
        )
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.uffds: NDArray[np.int32] = np.full(MOST_SPACES + 1, -1, dtype=np.int32)
        self.uffds[:2] = uffd, self._bell
        self.spaces = 1
        self.failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve from now on, also what has waited. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Finish the faults that were read, and serve no more; who faults from now on waits. Idempotent."""
        if self._thread is not None:
            os.eventfd_write(self._bell, 1)
            self._thread.join()
            self._thread = None
            os.eventfd_read(self._bell)

    def exchange(self, table: Table) -> None:
        """Serve with another table from now on; who faults meanwhile waits."""

        def change() -> None:
            self._table = table

        self.meanwhile(change)

    def meanwhile(self, work: Callable[[], None]) -> None:
        """Do some work while no fault is served."""
        # Until that has happened processors of the guest may wait.
        with sched.favoured([threading.get_native_id()]):
            self.stop()
            try:
                work()
            finally:
                self.start()

    def close(self) -> None:
        """Stop, and let go of forked children's memory. Idempotent."""
        self.stop()
        for uffd in self.uffds[1 : self.spaces]:
            close(int(uffd))
        self.spaces = 1
        close(self._bell)

    def _serve(self) -> None:
        prctl.set_name("outboard-faults")
        # Processors of the guest wait for it, whoever started it.
        with sched.favoured([threading.get_native_id()]):
            self._serve_on()

    def _serve_on(self) -> None:
        state = self._desk.state
        while True:
            reason = serve(self.uffds, self.spaces, SPIN_NS, self._table, self._desk)
            detail = state[State.DETAIL : State.SIZE].tolist()
            if reason == Reason.COMMAND:
                return
            if reason == Reason.EVENT:
                self._event(*detail)
            elif reason == Reason.GONE and detail[0] > 0:
                self._forget(detail[0])
            elif reason == Reason.DAMAGED:
                self.failure = DamagedPageError(
                    f"page {detail[0]} is not what was put into its store; whoever touched it got a memory error"
                )
            else:
                self.failure = (
                    KernelError("read of the guest's userfaultfd", errno.ESRCH)
                    if reason == Reason.GONE
                    else KernelError(f"answer to a fault on page {detail[1]}", detail[0])
                )
                return

    def _event(self, kind: int, first: int, second: int, third: int, space: int) -> None:
        if kind == EventKind.FORK:
            self._adopt(first)
        elif kind == EventKind.REMAP and space == 0:
            rows = self._table.regions
            moved = (rows[:, 2] >= first) & (rows[:, 2] + rows[:, 1] * PAGE_SIZE <= first + third)
            rows[moved, 2] += second - first

    def _adopt(self, uffd: int) -> None:
        if self.spaces == MOST_SPACES:
            # Its absent pages read as zeros to it: a child more than we can serve is one that we cannot keep whole.
            close(uffd)
            self.failure = KernelError(f"service of more than {MOST_SPACES} forked address spaces", errno.E2BIG)
            return
        os.set_blocking(uffd, False)
        self.uffds[self.spaces + 1] = self._bell
        self.uffds[self.spaces] = uffd
        self.spaces += 1

    def _forget(self, space: int) -> None:
        # It has ended.
        close(int(self.uffds[space]))
        self.uffds[space : self.spaces] = self.uffds[space + 1 : self.spaces + 1]
        self.spaces -= 1

    def statistics(self) -> FaultStatistics:
        """A frozen snapshot."""
        pool, file, zero, minor, protected, left, raced, again, damaged, disk, snapshot = self._desk.counts.tolist()
        latencies = self._histogram.statistics()
        return FaultStatistics(
            pool, file, zero, minor, protected, left, raced, again, damaged, disk, snapshot, latencies
        )
