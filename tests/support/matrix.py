"""Everything that may go wrong with a migration at every moment of it, and what becomes of the VM: one table.

The tests, ``script/chaos migrate`` and the table in the documentation are made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from outboard.migrate.states import State


class Moment(Enum):
    """A moment that a fault can hit; the value is how people call it."""

    PREPARING = "preparing"
    COPYING = "copying"
    SWITCHING = "switching"
    COMMITTED = "committed, on its way"
    TAKEN = "committed, written down"
    POSTCOPY = "postcopy"
    RECOVERING = "recovering"

    @property
    def state(self) -> State:
        """What the source reports then."""
        return State(self.value.partition(",")[0])


class Fault(Enum):
    """What goes wrong; the value is how people call it."""

    CANCEL = "`outboard cancel`"
    CUT = "every connection ends"
    SOURCE_MUTE = "what the source sends is lost for more than 10 s"
    TARGET_MUTE = "what the destination sends is lost for more than 10 s"
    BOTH_MUTE = "all is lost for more than 10 s"
    SOURCE_AGENT = "`kill -9` of the source's agent"
    SOURCE_ENGINE = "`kill -9` of the source's engine"
    TARGET_AGENT = "`kill -9` of the destination's agent"
    TARGET_ENGINE = "`kill -9` of the destination's engine"
    SOURCE_VMM = "`kill -9` of the source's QEMU"
    TARGET_VMM = "`kill -9` of the destination's QEMU"


class Place(Enum):
    """Where the VM is afterwards; the value is how people call it."""

    SOURCE = "source"
    TARGET = "destination"
    GONE = "ended"
    STOPPED = "ended; its pages that had not gone are kept, stopped, at the source"


@dataclass(frozen=True)
class Outcome:
    """What the user sees, and where the VM is.

    :ivar exit_code: of ``outboard migrate``; :ivar state: the last that it reports, None: the agent that would have
        told is gone, or the engine.
    """

    exit_code: int
    state: State | None
    place: Place


CANCELLED = Outcome(5, State.CANCELLED, Place.SOURCE)
FAILED = Outcome(1, State.FAILED, Place.SOURCE)
UNREACHED = Outcome(8, State.FAILED, Place.SOURCE)
DIED = Outcome(1, None, Place.SOURCE)
ENDED = Outcome(1, State.FAILED, Place.GONE)
DONE = Outcome(0, State.COMPLETED, Place.TARGET)
UNTOLD = Outcome(8, None, Place.TARGET)
LOST = Outcome(6, State.PAUSED, Place.STOPPED)

_BEFORE = (Moment.PREPARING, Moment.COPYING, Moment.SWITCHING)
_AFTER = (Moment.COMMITTED, Moment.TAKEN, Moment.POSTCOPY, Moment.RECOVERING)


def _broken(*, at_commit: Outcome) -> dict[Moment, Outcome]:
    """The hosts do not reach each other, or one's engine is gone."""
    return {
        **dict.fromkeys(_BEFORE, FAILED),
        Moment.PREPARING: UNREACHED,
        **dict.fromkeys(_AFTER, DONE),
        Moment.COMMITTED: at_commit,
    }


_OUTCOMES: dict[Fault, dict[Moment, Outcome]] = {
    Fault.CANCEL: {**dict.fromkeys(_BEFORE, CANCELLED), **dict.fromkeys(_AFTER, DONE)},
    Fault.CUT: _broken(at_commit=FAILED),
    Fault.SOURCE_MUTE: _broken(at_commit=FAILED),
    Fault.TARGET_MUTE: _broken(at_commit=FAILED),
    Fault.BOTH_MUTE: _broken(at_commit=FAILED),
    Fault.SOURCE_AGENT: dict.fromkeys(Moment, UNTOLD),
    Fault.SOURCE_ENGINE: {
        **dict.fromkeys(_BEFORE, DIED),
        **dict.fromkeys(_AFTER, DONE),
        Moment.COMMITTED: FAILED,
    },
    Fault.TARGET_AGENT: dict.fromkeys(Moment, DONE),
    Fault.TARGET_ENGINE: _broken(at_commit=FAILED),
    Fault.SOURCE_VMM: {**dict.fromkeys(_BEFORE, ENDED), **dict.fromkeys(_AFTER, DONE)},
    Fault.TARGET_VMM: {**dict.fromkeys(_BEFORE, FAILED), **dict.fromkeys(_AFTER, LOST)},
}

CELLS: dict[tuple[Moment, Fault], Outcome] = {
    (moment, fault): _OUTCOMES[fault][moment] for fault in Fault for moment in Moment
}
"""Every moment with every fault."""

_F = Fault
IN_TESTS: dict[Moment, tuple[Fault, ...]] = {
    Moment.PREPARING: (_F.CANCEL, _F.SOURCE_ENGINE, _F.TARGET_ENGINE, _F.TARGET_VMM),
    Moment.COPYING: (_F.CUT,),
    Moment.SWITCHING: (_F.CANCEL, _F.TARGET_ENGINE, _F.TARGET_VMM),
    Moment.COMMITTED: (_F.CANCEL, _F.CUT, _F.SOURCE_ENGINE, _F.TARGET_ENGINE, _F.SOURCE_VMM),
    Moment.TAKEN: (_F.CUT, _F.SOURCE_ENGINE, _F.TARGET_ENGINE, _F.TARGET_VMM),
    Moment.POSTCOPY: (_F.TARGET_AGENT,),
    Moment.RECOVERING: (_F.CUT, _F.SOURCE_ENGINE, _F.TARGET_ENGINE, _F.SOURCE_VMM),
}
"""The cells that the tests play: of those that no other test shows the quicker; ``script/chaos migrate`` plays all."""
