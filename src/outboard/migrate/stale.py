"""Stale pages: those that were sent and have been written since, from the first look at them to the last."""

from __future__ import annotations

from outboard.errors import KernelError
from outboard.migrate import messages, ranking
from outboard.migrate.devices import Devices
from outboard.migrate.findings import Findings
from outboard.migrate.line import Line
from outboard.migrate.method import PAUSE_MOST_S, PAUSE_SHARE, Options
from outboard.migrate.outbox import Outbox
from outboard.migrate.refining import refined
from outboard.migrate.sending import Send
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.trace.writes import WriteTrace
from outboard.vmm.guest import Guest

_UNPACED = 100e6
"""Bytes/s that a link of unknown rate is taken to carry."""


class Stale:
    """Finds them by the write trace, and has them sent again or forgotten.

    ``trace`` may come later; without one nothing is known to be written.

    Synchronization: one thread.
    """

    def __init__(
        self, guest: Guest, outbox: Outbox, line: Line, options: Options, findings: Findings, devices: Devices
    ) -> None:
        self.trace: WriteTrace | None = None
        self._guest, self._outbox, self._line = guest, outbox, line
        self._options, self._findings, self._devices = options, findings, devices

    def _written(self, within: PageSet | None = None) -> PageSet:
        return PageSet(self._outbox.pages) if self.trace is None else self.trace.collect(within)

    def _found(self, also: PageSet | None = None) -> PageSet:
        """Those that were sent and are stale; from now on ``also`` is watched too, which goes next."""
        if self.trace is None:
            return PageSet(self._outbox.pages)
        sent = self._outbox.already_sent()
        written = self._written(sent if also is None else sent | also)
        ranking.revive(self._outbox, written)
        return refined(self._guest, self._outbox, written & sent)

    def send_early(self) -> None:
        """Send again what was written since it was sent, while the guest still runs: the less is left for the pause.

        With it goes what the devices are about to touch, if a trace tells when that is written.
        """
        due = PageSet(self._outbox.pages) if self.trace is None else self._devices.due()
        stale = self._found(due)
        self._outbox.again(stale | due, ranking.STALE_NOW)
        self._findings.resent_pages += len(stale)
        self._line.order(Send(0, self._outbox.pages, ranking.STALE_NOW, paced=False, changes=True))
        self._line.await_sent()

    def settle(self) -> None:
        """In the pause: send again as far as time allows, and have the rest forgotten.

        Nothing here waits: QEMU saves its devices while the pages travel, and the destination holds what it saves until
        they are in place.
        """
        outbox, line, options = self._outbox, self._line, self._options
        due = self._devices.due() if options.method.resumes_early else PageSet(outbox.pages)
        # In rounds also what was written during the last one: the destination holds it as it was before.
        if options.method.rounds:
            stale = refined(self._guest, outbox, self._written()) | outbox.unsent()
        else:
            stale = self._found(due)
        self._findings.resent_pages += len(stale)
        if options.method.resumes_early:
            stale |= due
            rate = outbox.statistics().rate or _UNPACED
            seconds = min(PAUSE_MOST_S, PAUSE_SHARE * options.max_downtime)
            now, later = ranking.split_stale(outbox, stale, int(seconds * rate / PAGE_SIZE))
            upto = ranking.STALE_NOW
        else:
            now, later, upto = stale, PageSet(stale.pages), ranking.LAST
        if later:
            now -= self._forget(later)
        if now:
            if self.trace is None:
                self._devices.watch(now)
            outbox.again(now, ranking.STALE_NOW)
            line.order(Send(0, outbox.pages, upto, paced=False, changes=True))
        line.control.send(messages.Final(line.barrier()))

    def forget_late(self) -> None:
        """QEMU itself may write to the guest's memory while it saves devices: such pages are fetched again."""
        late = self._found() | self._devices.changed()
        self._findings.resent_pages += len(late)
        if late:
            self._forget(late)

    def _forget(self, pages: PageSet) -> PageSet:
        """Have pages forgotten, large ones whole; which those are."""
        whole = pages if self._outbox.unit == 1 else pages.widened(self._outbox.unit)
        self._outbox.again(whole, ranking.STALE_LATER)
        self._line.control.send_pages(messages.FORGET, whole, messages.Forget())
        return whole

    def revive(self) -> None:
        """Give a turn to what was free when the guest was asked, or without memory then, and was written since."""
        try:
            alive = self._guest.memory.populated() if self.trace is None else self._written()
        except KernelError:
            # QEMU has died, and with it what had been written: whatever has memory may be alive.
            alive = self._guest.memory.populated()
        if self._outbox.unit > 1:
            # A coarse trace names all of a large page. What of it was free, and went as zeros, stays free: had it been
            # written to, it would have been found stale.
            alive -= self._outbox.already_sent()
        ranking.revive(self._outbox, alive)
