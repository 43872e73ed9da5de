"""The states of a migration, as a table.

Two questions decide the shape: *where is the VM safe*, and *who may let it run*. Up to COMMIT only the source may: the
destination holds a loaded but stopped QEMU that ends itself when the source's control stream closes. COMMIT is the
source's last word ("I shall not run it again"), sent when the destination has reported that QEMU took the device state.
From then on only the destination may run it, and what has not arrived is still whole in the source's memory, which
stays until the destination says that nothing is missing.

COMMIT may be lost on its way. The destination then ends its QEMU, and its agent swears, to the source that asks again,
that nobody there will ever run it (REFUSED): the oath and the commit exclude each other, on that host's disk.

::

    event      who says it     what it means
    PREPARE    the user        the destination's agent is asked for a QEMU and its streams
    READY      destination     streams are up, the destination's memory is armed
    SWITCH     the method      pause at the source, send what is left before the commit
    COMMIT     source          device state is loaded over there; the source gives the VM away
    RESUMED    destination     the VM runs there
    ARRIVED    destination     no page is missing there any more
    BREAK      anybody         the streams broke off; both ends keep what they have, and the source calls again
    RECOVERED  destination     new streams are up, and the source knows what had arrived
    REFUSED    its agent       the COMMIT never arrived, and will not be taken any more
    CANCEL     the user        stop it; only before COMMIT
    FAIL       anybody         something broke

The documentation's diagram is drawn from :data:`TRANSITIONS`.
"""

from __future__ import annotations

from enum import Enum

from outboard.errors import OutboardError


class State(Enum):
    """Where a migration stands; the value is what people and JSON see."""

    NEW = "new"
    PREPARING = "preparing"
    COPYING = "copying"
    SWITCHING = "switching"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"
    RECOVERING = "recovering"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"


class Event(Enum):
    """What moves a migration on."""

    PREPARE = "prepare"
    READY = "ready"
    SWITCH = "switch"
    COMMIT = "commit"
    RESUMED = "resumed"
    ARRIVED = "arrived"
    BREAK = "break"
    RECOVERED = "recovered"
    REFUSED = "refused"
    CANCEL = "cancel"
    FAIL = "fail"


class Where(Enum):
    """Where the VM is, and who may let it run."""

    SOURCE = "source"
    """Whole at the source, and runs there (in SWITCHING: paused there, to run again if anything fails)."""
    BOTH = "destination, with pages still at the source"
    """The destination alone may run it; the source keeps the pages that have not arrived."""
    DESTINATION = "destination"
    """Whole at the destination."""


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.NEW, Event.PREPARE): State.PREPARING,
    (State.NEW, Event.FAIL): State.FAILED,
    (State.NEW, Event.CANCEL): State.CANCELLED,
    (State.PREPARING, Event.READY): State.COPYING,
    (State.PREPARING, Event.FAIL): State.FAILED,
    (State.PREPARING, Event.CANCEL): State.CANCELLED,
    (State.COPYING, Event.SWITCH): State.SWITCHING,
    (State.COPYING, Event.FAIL): State.FAILED,
    (State.COPYING, Event.CANCEL): State.CANCELLED,
    (State.SWITCHING, Event.COMMIT): State.COMMITTED,
    (State.SWITCHING, Event.FAIL): State.FAILED,
    (State.SWITCHING, Event.CANCEL): State.CANCELLED,
    (State.COMMITTED, Event.RESUMED): State.POSTCOPY,
    (State.COMMITTED, Event.REFUSED): State.FAILED,
    (State.COMMITTED, Event.FAIL): State.PAUSED,
    (State.POSTCOPY, Event.ARRIVED): State.COMPLETED,
    (State.POSTCOPY, Event.BREAK): State.RECOVERING,
    (State.POSTCOPY, Event.FAIL): State.PAUSED,
    (State.RECOVERING, Event.RECOVERED): State.POSTCOPY,
    (State.RECOVERING, Event.FAIL): State.PAUSED,
}

SAFE_AT: dict[State, Where] = {
    State.NEW: Where.SOURCE,
    State.PREPARING: Where.SOURCE,
    State.COPYING: Where.SOURCE,
    State.SWITCHING: Where.SOURCE,
    State.COMMITTED: Where.BOTH,
    State.POSTCOPY: Where.BOTH,
    State.RECOVERING: Where.BOTH,
    State.PAUSED: Where.BOTH,
    State.COMPLETED: Where.DESTINATION,
    State.FAILED: Where.SOURCE,
    State.CANCELLED: Where.SOURCE,
}

FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED, State.PAUSED})


class IllegalTransitionError(OutboardError):
    """An event came in a state that has no place for it."""


class Machine:
    """A migration's state; the only way to change it is an event that the table has.

    Synchronization: none; one thread drives a migration.
    """

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State.NEW

    def on(self, event: Event) -> State:
        """Take ``event`` and return the new state.

        :raise IllegalTransitionError: the table has no such transition; the state is unchanged.
        """
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise IllegalTransitionError(f"a migration that is {self.state.value} cannot take {event.value}") from None
        return self.state

    def accepts(self, event: Event) -> bool:
        """Whether ``event`` has a place in the present state."""
        return (self.state, event) in TRANSITIONS

    @property
    def safe_at(self) -> Where:
        """Where the VM is safe now."""
        return SAFE_AT[self.state]
