"""Copying in rounds: all of memory, then what was written meanwhile, until the rest fits in the pause."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from outboard.errors import KernelError, OutboardError
from outboard.linux import proc
from outboard.migrate import ranking
from outboard.migrate.method import WORTH_A_ROUND, Method, Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.refining import refined
from outboard.migrate.report import Round
from outboard.migrate.sending import Done
from outboard.migrate.steering import Steering
from outboard.migrate.throttle import Holding, Throttle, usual
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.trace.writes import MessageTrace, WriteTrace
from outboard.vmm.brake import Brake
from outboard.vmm.guest import Guest

_DEVICES_S = 0.05
"""What saving and loading the devices takes of an allowed downtime."""
_FIRST_LOOK_S, _NEXT_LOOK = 0.05, 1.5
"""Looks at the growth lie ever further apart: each is 1.5 times as late as the one before."""
_LESS = 0.75
"""What a round that only shortens the pause must leave at most of the one before, if another is to follow."""
_SAMPLE_S = 0.2
"""How long to look for writers at most."""


class Sending(Protocol):
    """Sends all that is due, and calls ``meanwhile`` now and then."""

    def __call__(self, meanwhile: Callable[[], None]) -> Done: ...


@dataclass(slots=True)
class _Waits:
    """Lets writers wait at a synchronous trace, each page's first write for so long that they get their share."""

    trace: MessageTrace
    rate: float
    """First writes a second of one writer that nobody holds back."""

    def hold(self, share: float) -> None:
        self.trace.delay_s = (1 / share - 1) / self.rate

    def release(self) -> None:
        self.trace.delay_s = 0.0


class Rounds:
    """Copies ``guest`` until what is left fits in the pause, or, where the VM may resume early, while it helps.

    :param steering: says how long the pause may be, and when to hurry.
    :param send: sends all that is due, unless the outbox is halted.
    :param elapsed: seconds since the migration began.
    :param gain: as in :class:`~outboard.migrate.throttle.Throttle`.

    ``done`` has the rounds so far, and ``dirty_rate`` what the guest wrote in the last one, in bytes/s; ``cut_short``
    says in words why they ended before their time, None if they did not.

    Synchronization: one thread.
    """

    def __init__(
        self,
        guest: Guest,
        outbox: Outbox,
        trace: WriteTrace,
        options: Options,
        steering: Steering,
        send: Sending,
        elapsed: Callable[[], float],
        gain: float,
    ) -> None:
        self._guest, self._outbox, self._trace, self._options = guest, outbox, trace, options
        self._steering, self._send, self._elapsed = steering, send, elapsed
        self._written = PageSet(outbox.pages)
        self._armed_at = self._due = 0.0
        self._due_pages = 0
        self._ran: dict[int, float] = {}
        self.done: list[Round] = []
        self.resent_pages = 0
        self.dirty_rate: float | None = None
        self.cut_short: str | None = None
        self.throttle = Throttle(self._find_writers, gain)

    def run(self) -> None:
        """Copy. Whoever is held back is so until :meth:`release`: what is written until the pause is sent in it.

        :raise OutboardError: the peer or the guest is gone, or it was cancelled.
        """
        last = Done(0, 0, 0.0, True)
        fitted = math.inf
        while True:
            done = self._round()
            before, left = self._due_pages, len(self._written)
            share = self.throttle.share
            self.done.append(Round(sent_pages=before, seconds=done.seconds, dirty_pages=left, share=share))
            self.dirty_rate = left * PAGE_SIZE / done.seconds if done.seconds else None
            # Over two rounds: the last ones are too short to tell.
            content, seconds = done.content + last.content, done.seconds + last.seconds
            rate, last = content / PAGE_SIZE / seconds if seconds else 0.0, done
            goal = rate * max(0.0, self._steering.max_downtime - _DEVICES_S)
            hurried = self._steering.hurried
            if hurried is not None:
                self.cut_short = hurried if left > goal else None
                return
            if left <= goal:
                # At a minimum of what remains: the pause is the shorter for it.
                if (
                    self._options.method is Method.HYBRID
                    or left > _LESS * fitted
                    or not self.throttle.shortens(left, rate)
                ):
                    return
                fitted = left
            elif self._options.method is Method.HYBRID and left > WORTH_A_ROUND * before:
                return
            self.resent_pages += left
            # Whoever is held back is so for these last rounds too.
            if left > goal and self._options.throttles and rate:
                self.throttle.steer(self._elapsed(), left, rate, goal)

    @property
    def held(self) -> str | None:
        """Who is held back now, and why; None: nobody."""
        return self.throttle.words if self.throttle.share < 1 else None

    def release(self) -> None:
        """Hold nobody back any more. Idempotent."""
        self.throttle.release(self._elapsed())

    def _round(self) -> Done:
        # From here on it is known since when the trace is armed, and that nobody was let off the hold meanwhile.
        written = refined(self._guest, self._outbox, self._trace.collect())
        ranking.revive(self._outbox, written)
        self._outbox.again(written & self._outbox.already_sent(), ranking.UNCLASSED)
        self._due_pages = len(self._outbox.unsent())
        self._armed_at, self._due = time.monotonic(), _FIRST_LOOK_S
        self._ran = self._processor_seconds()
        done = self._send(self._look)
        self._written = refined(self._guest, self._outbox, self._trace.collect())
        self.throttle.look(time.monotonic() - self._armed_at, len(self._written))
        self._outbox.again(self._written, ranking.UNCLASSED)
        return done

    def _look(self) -> None:
        """How much has been written so far, without forgetting it."""
        if self._steering.hurried is not None:
            self._outbox.halted = True
        seconds = time.monotonic() - self._armed_at
        # A coarse trace tells too much before it is refined.
        if seconds < self._due or not self._options.throttles or self._outbox.digests is not None:
            return
        self._due = seconds * _NEXT_LOOK
        self.throttle.look(seconds, len(self._trace.peek()))

    def _processor_seconds(self) -> dict[int, float]:
        found = {}
        for vcpu in self._guest.vcpus:
            try:
                found[vcpu.tid] = proc.processor_seconds(self._guest.pid, vcpu.tid)
            except KernelError:
                # One that is unplugged meanwhile.
                continue
        return found

    def _find_writers(self) -> tuple[Holding, str]:
        """What holds back the vCPUs that write, and who they are.

        :raise OutboardError: they cannot be held back.
        """
        took = usual(self._ran, self._processor_seconds(), time.monotonic() - self._armed_at)
        met = self._trace.writers(self._written, _SAMPLE_S)
        writers = {tid: took[tid] for tid in met if tid in took}
        if isinstance(self._trace, MessageTrace):
            return _Waits(self._trace, (self.throttle.growth.rate or 1.0) / max(1, len(writers))), "whoever writes"
        if not writers:
            # Nobody was met in time; those that hardly run cannot be the ones.
            writers = {tid: part for tid, part in took.items() if part > min(took.values())} or took
        if not writers:
            raise OutboardError(f"{self._guest.name} has no vCPU threads that are known")
        indices = [str(vcpu.index) for vcpu in self._guest.vcpus if vcpu.tid in writers]
        return Brake(self._guest, writers), f"vCPU {', '.join(indices)}"
