"""The fault path: one process that does nothing but serve the faults of one guest.

It polls the userfaultfd and the peer's urgent stream. A fault is answered from here when the page is known to be zero,
and asked of the peer otherwise; nothing here logs, waits for bulk work or takes a lock. The bulk's process tells us of
pages that it placed while we waited for them, so that their latency is counted too.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outboard.errors import UnreachableError
from outboard.linux.userfaultfd import FaultFlag
from outboard.pager.arriving import ArrivingMemory
from outboard.pager.latency import Latencies, LatencyHistogram
from outboard.pages.residency import Where
from outboard.pages.shared import shared_array
from outboard.stores.peer import PeerStore

_MESSAGE = struct.Struct("<B7xQQQ")
"""struct uffd_msg of a page fault: event, flags, address, thread."""
_THREAD = 0xFFFFFFFF
"""The thread is 32 bits of the last word."""
_AT_ONCE = 64
_FIRST_PAGES = 32
"""Of so many faults of devices the pages are kept."""
# As plain numbers: an enumeration's operators are Python code.
_MINOR_FAULT, _PEER, _ZERO_PAGE = int(FaultFlag.MINOR), int(Where.PEER), int(Where.ZERO)
_PAGE_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class FaultStatistics:
    """Faults served so far, by where the page came from."""

    remote: int
    zero: int
    minor: int
    raced: int
    loading: int
    """Of the remote ones before the resume, those that no vCPU raised: the VMM loads its devices."""
    device: int
    """Of those after it, the same."""
    device_pages: tuple[int, ...]
    """The pages of the first of both."""
    latencies: Latencies


class FaultCounters:
    """The live counts, in memory shared with the engine that reads them.

    Synchronization: the fault process writes, any reads; made before it is forked.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = shared_array(6, np.int64)
        self.device_pages: NDArray[np.int64] = shared_array(_FIRST_PAGES, np.int64)
        self.latency = LatencyHistogram()

    def statistics(self) -> FaultStatistics:
        """A frozen snapshot."""
        remote, zero, minor, raced, loading, device = self.counts.tolist()
        pages = tuple(self.device_pages[: loading + device].tolist())
        return FaultStatistics(remote, zero, minor, raced, loading, device, pages, self.latency.statistics())


_REMOTE, _ZERO, _MINOR, _RACED, _LOADING, _DEVICE = range(6)


class PeerFaultServer:
    """Serves the faults of ``memory``'s guest from ``peer``.

    :param commands: a datagram socket; ``b"open"`` opens the peer, ``b"stop"`` ends :meth:`serve`; other lengths of
        eight bytes are page numbers that the bulk has just placed.
    """

    def __init__(
        self, memory: ArrivingMemory, peer: PeerStore, counters: FaultCounters, commands: socket.socket
    ) -> None:
        self._memory = memory
        self._peer = peer
        self._counters = counters
        self._commands = commands
        self._messages = bytearray(_MESSAGE.size * _AT_ONCE)
        # An element of a memoryview is an int at once, that of an array an object of NumPy's.
        self._where = memoryview(memory.residency.where)  # type: ignore[arg-type]  # an array has the buffer interface
        self._vcpus = frozenset(vcpu.tid for vcpu in memory.guest.vcpus)
        self._waiting = memoryview(memory.waiting)  # type: ignore[arg-type]

    def serve(self) -> None:
        """Serve until told to stop.

        When the peer is gone, faults on its pages wait; all others are answered as before.

        :raise KernelError: the userfaultfd failed.
        """
        uffd, answers = self._memory.uffd.fileno(), self._peer.fileno()
        poll = select.poll()
        for fd in (uffd, answers, self._commands.fileno()):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                try:
                    if fd == uffd:
                        self._faults()
                    elif fd == answers:
                        self._answers()
                    elif not self._command(self._commands.recv(4096)):
                        return
                except UnreachableError:
                    self._peer.lost()
                    with contextlib.suppress(KeyError):
                        poll.unregister(answers)

    def _command(self, command: bytes) -> bool:
        if command == b"stop":
            return False
        if command == b"open":
            self._peer.open()
        else:
            for (page,) in _PAGE_NUMBER.iter_unpack(command):
                self._arrived(page)
        return True

    def _faults(self) -> None:
        memory, where, waiting, counts = self._memory, self._where, self._waiting, self._counters.counts
        wanted: list[int] = []
        count = memory.uffd.read_into(self._messages)
        for index in range(count):
            _, flags, address, thread = _MESSAGE.unpack_from(self._messages, index * _MESSAGE.size)
            page = memory.page_of(address)
            if flags & _MINOR_FAULT:
                memory.map_present(page)
                counts[_MINOR] += 1
                continue
            # Say that somebody waits before looking where the page is: the bulk looks after it has placed.
            waiting[page] = 1
            at = where[page]
            if at == _PEER:
                wanted.append(page)
                if thread & _THREAD not in self._vcpus:
                    before = counts[_LOADING] + counts[_DEVICE]
                    if before < _FIRST_PAGES:
                        self._counters.device_pages[before] = page
                    counts[_DEVICE if memory.running else _LOADING] += 1
                continue
            waiting[page] = 0
            if at == _ZERO_PAGE:
                memory.place_zero(page)
                if not self._arrived(page):
                    counts[_ZERO] += 1
            else:
                memory.ask_again(page)
                counts[_RACED] += 1
        if wanted:
            self._peer.ask(wanted)

    def _answers(self) -> None:
        if self._memory.unit > 1:
            for runs, zero, content in self._peer.fetched_whole():
                for page in self._memory.place(runs, zero, content).tolist():
                    self._arrived(page)
            return
        for page, address in self._peer.fetched():
            if address is None:
                self._memory.place_zero(page)
            else:
                self._memory.place_one(page, address)
            self._arrived(page)

    def _arrived(self, page: int) -> bool:
        self._waiting[page] = 0
        waited = self._peer.arrived(page)
        if waited is None:
            return False
        self._counters.latency.record(waited)
        self._counters.counts[_REMOTE] += 1
        return True
