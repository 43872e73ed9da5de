"""Delivery: the VM has been given away, and everything that the destination has not yet is sent, whatever breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from outboard.errors import OutboardError, PeerError, UnreachableError
from outboard.migrate import messages, ranking
from outboard.migrate.findings import Findings
from outboard.migrate.line import Line
from outboard.migrate.outbox import Outbox
from outboard.migrate.progress import Watch
from outboard.migrate.sending import Send
from outboard.migrate.stale import Stale
from outboard.migrate.states import Event, State
from outboard.migrate.steering import Steering
from outboard.pages import PAGE_SIZE

_RETRY_S, _RETRY_MOST_S = 0.2, 5.0
"""Between two calls to a destination that does not answer: at first, and at most."""


class SwornOffError(OutboardError):
    """The destination never heard that the VM was given to it, and will not take it any more: it is the source's."""


class Delivery:
    """Sends what is still here, calls again when the streams break off, and ends when the destination has all.

    :param resumed: called when it is known that the VM runs at the destination.

    Synchronization: one thread, that of ``steering``.
    """

    def __init__(
        self,
        vm: str,
        outbox: Outbox,
        line: Line,
        stale: Stale,
        steering: Steering,
        watch: Watch,
        findings: Findings,
        resumed: Callable[[], None],
    ) -> None:
        self._vm, self._outbox, self._line, self._stale = vm, outbox, line, stale
        self._steering, self._watch, self._findings = steering, watch, findings
        self._resumed = resumed

    def run(self, *, sent: bool = False) -> None:
        """Deliver; ``sent``: it is all on its way.

        :raise SwornOffError: the VM goes on here.
        :raise OutboardError: the destination's QEMU has ended.
        """
        while True:
            try:
                if self._steering.machine.state is State.COMMITTED:
                    self.await_resumed()
                if not sent:
                    self.send_rest()
                self._arrived(self._line.await_message(messages.Arrived, timeout=None))
            except UnreachableError as error:
                if not self._recover(error):
                    sent = False
                    continue
            return

    def take_over(self) -> None:
        """Deliver in the place of an engine that died; raises as :meth:`run`."""
        if not self._recover(UnreachableError("the engine died, and another has taken over")):
            self.run()

    def await_resumed(self) -> None:
        """Wait until the VM runs at the destination."""
        self._line.await_message(messages.Resumed)
        self._resumed()

    def send_rest(self) -> None:
        """Send everything that is still to come, and say which pages those are; all others read as zeros."""
        outbox, line = self._outbox, self._line
        if outbox.unit == 1:
            line.order(Send(0, outbox.pages, ranking.LAST, paced=True))
        # Of a large page the bulk leaves out what was free: that has to be known before it goes.
        self._stale.revive()
        line.control.send_pages(messages.LIVE, outbox.live(), messages.Live())
        line.order(Send(0, outbox.pages, ranking.LAST, paced=True))
        done = line.await_sent()
        if done.octets > 64 * PAGE_SIZE:
            self._findings.bulk_rate = done.octets / done.seconds
        line.say(messages.AllSent())

    def _arrived(self, message: messages.Arrived) -> None:
        self._findings.arrived = message
        self._steering.on(Event.ARRIVED)

    def _recover(self, why: UnreachableError) -> bool:
        """Call again until somebody answers; whether that was to say that everything has arrived."""
        if self._steering.machine.state is State.POSTCOPY:
            self._steering.on(Event.BREAK)
        self._line.hang_up()
        self._watch.broken = str(why)
        delay = _RETRY_S
        while True:
            with contextlib.suppress(UnreachableError):
                whole = self._call_again()
                self._watch.broken = None
                return whole
            self._steering.wait(delay)
            delay = min(2 * delay, _RETRY_MOST_S)

    def _call_again(self) -> bool:
        steering, target = self._steering, self._line.destination
        given = steering.machine.state is State.COMMITTED
        match self._line.call_again():
            case messages.Prepared() as prepared:
                self._line.open_again(prepared)
                self._goes_on(given=given)
                return False
            case messages.Arrived() as arrived:
                self._goes_on(given=given)
                self._arrived(arrived)
                return True
            case messages.Refused() if given:
                raise SwornOffError(
                    f"{target.name} never heard that {self._vm} was given to it, and has sworn it off; the VM goes on "
                    "at the source"
                )
            case other:
                raise PeerError(f"{target.name} answered {type(other).__name__} to a call for {self._line.migration}")

    def _goes_on(self, *, given: bool) -> None:
        if given:
            self._resumed()
        else:
            self._steering.on(Event.RECOVERED)
