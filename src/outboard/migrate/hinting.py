"""What a guest is known to need, from what its agent says or from what it is seen to touch.

The agent's answer takes as long as a busy guest lets its agent wait, and comes in pieces; a process of its own waits
for it while the engine prepares the destination. Each piece is ranked in the outbox there and then named to the engine,
which may order the bulk to send it; nobody walks pages that are being ranked.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from outboard.errors import PeerError, RefusedError, UnreachableError
from outboard.linux import sched
from outboard.migrate import ranking
from outboard.migrate.findings import Findings
from outboard.migrate.method import Method, Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.steering import Speakers, Steering
from outboard.migrate.worker import Worker
from outboard.pages.pageset import PageSet
from outboard.trace.idle import IdleTrace
from outboard.trace.writes import WriteTrace
from outboard.vmm.enlighten import chunks
from outboard.vmm.guest import QemuGuest
from outboard.vmm.guest_agent import GuestAgent

_MOST_S = 5.0
"""What has not been said by then is not waited for."""


class Classed(msgspec.Struct, frozen=True, tag="classed"):
    """The pages ``[first, first + count)`` have been ranked."""

    first: int
    count: int


class Told(msgspec.Struct, frozen=True, tag="told"):
    """The guest has said what it will; ``words`` sum that up."""

    words: str


decode_hint: msgspec.json.Decoder[Classed | Told] = msgspec.json.Decoder(Classed | Told)


def ask(guest: QemuGuest, outbox: Outbox, link: socket.socket) -> None:
    """Be the worker: rank what the guest tells, and report each piece to ``link``; the last report is Told."""
    began = time.monotonic()
    told = 0

    def tell(hint: Classed | Told) -> None:
        link.send(msgspec.json.encode(hint))

    if guest.agent_path is None:
        tell(Told("none: the VM has no guest agent"))
        return
    try:
        with GuestAgent(guest.agent_path, timeout=_MOST_S) as agent:
            for first, classes in chunks(guest, agent, deadline=began + _MOST_S):
                ranking.rank_classes(outbox, first, classes)
                told += classes.size
                tell(Classed(first, classes.size))
    except (PeerError, UnreachableError, OSError) as error:
        tell(Told(f"{told} pages classed, then none: {error}" if told else f"none: {error}"))
    else:
        tell(Told(f"guest agent: {told} pages classed in {(time.monotonic() - began) * 1e3:.0f} ms"))


class Hints:
    """Asks one guest.

    :param classed: called with the first page and the number of pages of each piece that has been ranked.

    Synchronization: one thread, that of ``steering``; it forks a worker.
    """

    def __init__(
        self,
        guest: QemuGuest,
        outbox: Outbox,
        options: Options,
        steering: Steering,
        findings: Findings,
        classed: Callable[[int, int], None],
    ) -> None:
        self._guest, self._outbox, self._options, self._findings = guest, outbox, options, findings
        self._classed = classed
        self._asking: Worker | None = None
        self._trace: WriteTrace | None = None
        steering.listen(self._speakers)

    @property
    def told(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self._asking is None

    @contextlib.contextmanager
    def gathering(self, trace: WriteTrace | None) -> Iterator[None]:
        """Gather them while this lasts, as far as they are wanted; ``trace`` tells what is being written."""
        self._trace = trace
        with self._asked(), self._watched():
            yield

    def close(self) -> None:
        """Ask no more. Idempotent."""
        if self._asking is not None:
            self._asking.end()

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        guest = self._guest
        if not self._options.hints or self._options.method is Method.POST_COPY:
            yield
            return
        # A VM that is evicted gets little of a processor, and cannot answer on that.
        with sched.favoured([guest.emulator_thread(), *(vcpu.tid for vcpu in guest.vcpus)]):
            self._asking = Worker("outboard-hints", lambda link: ask(guest, self._outbox, link))
            yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What a guest without an agent touches while this lasts goes first."""
        guest, options, findings = self._guest, self._options, self._findings
        if options.method is not Method.ENLIGHTENED or not options.hints or guest.agent_path is not None:
            yield
            return
        try:
            idle = IdleTrace(guest)
        except RefusedError as error:
            findings.hints = f"none: the VM has no guest agent, and {error}"
            yield
            return
        began = time.monotonic()
        yield
        touched = guest.memory.populated() - idle.idle()
        ranking.rank_touched(self._outbox, touched)
        took = (time.monotonic() - began) * 1e3
        findings.hints = f"no guest agent; accesses: {len(touched)} pages touched in {took:.0f} ms"

    def _speakers(self) -> Speakers:
        return {} if self._asking is None else {self._asking.fileno(): self._take}

    def _take(self) -> None:
        report = None if self._asking is None else self._asking.hear(0)
        if report is None:
            return
        match decode_hint.decode(report):
            case Told(words):
                self._findings.hints = words
                self.close()
                self._asking = None
                self._outbox.halted = True
            case Classed(first, count):
                if self._trace is not None:
                    piece = PageSet.from_runs(self._outbox.pages, np.array([[first, count]]))
                    ranking.rank_written(self._outbox, self._trace.peek(piece) & piece)
                self._classed(first, count)
