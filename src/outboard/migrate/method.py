"""The four methods, as settings of one procedure: what goes before the pause, in the pause, and after the resume."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import msgspec

from outboard.migrate.codec import Compress
from outboard.migrate.messages import MAX_STREAMS


class Method(Enum):
    """How a VM is moved; the value is the option's name on the command line."""

    PRE_COPY = "pre-copy"
    """Everything before the resume, in rounds, until what the guest writes meanwhile fits in the allowed downtime."""
    POST_COPY = "post-copy"
    """Switch over at once; everything afterwards, faults first."""
    HYBRID = "hybrid"
    """Rounds as long as they shrink what remains, then the rest as post-copy."""
    ENLIGHTENED = "enlightened"
    """The guest's kernel first, then switch over; the rest in the order in which the guest is likely to need it, and
    never what it holds free."""

    @property
    def rounds(self) -> bool:
        """Whether all of memory is sent before the switch-over."""
        return self in (Method.PRE_COPY, Method.HYBRID)

    @property
    def resumes_early(self) -> bool:
        """Whether the VM may run at the destination with pages still missing."""
        return self is not Method.PRE_COPY


class Goal(Enum):
    """What matters most; the value is the name on the command line."""

    DOWNTIME = "downtime"
    """The guest stands still as briefly as it can."""
    TIME = "time"
    """The source is empty as soon as it can be."""
    BANDWIDTH = "bandwidth"
    """As few bytes cross the network as can be."""
    GUEST_SPEED = "guest-speed"
    """The guest runs as fast as before, all the way: nobody is held back, few pages are waited for."""


EARLY_SECONDS = 2.0
"""At most this long: a guest with tens of GiB of slab switches over all the same."""

PAUSE_SHARE = 0.25
"""The part of the allowed downtime, of at most PAUSE_MOST_S, that re-sending early pages may take in the pause; what
does not fit is fetched after the resume."""

PAUSE_MOST_S = 0.025
"""Making a page absent again costs half a millisecond where QEMU has it mapped, sending it again a twentieth."""

WORTH_A_ROUND = 0.7
"""Hybrid goes on with rounds while each leaves at most this share of what the one before left."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the user asked for.

    ``max_downtime`` in seconds, ``max_bandwidth`` in bytes/s. ``verify`` holds the VM paused at the switch-over until
    every page has arrived and the digests of both ends agree. ``throttle`` lets the vCPUs that write be held back where
    rounds would not end otherwise. ``compress`` says by which codec pages go, if by any, and ``streams`` on
    how many connections; None: as :mod:`outboard.migrate.streams` says. ``goal`` is where those come from that were
    not said; see :mod:`outboard.migrate.goals`. ``blocks``: pages that a disk image holds which both hosts have go as
    references; see :mod:`outboard.migrate.references`. ``timeout``: after so many seconds rounds end, whatever is left.
    """

    method: Method = Method.ENLIGHTENED
    hints: bool = True
    max_downtime: Annotated[float, msgspec.Meta(ge=0)] = 0.3
    timeout: Annotated[float, msgspec.Meta(ge=0)] | None = None
    max_bandwidth: int | None = None
    verify: bool = False
    throttle: bool = True
    compress: Compress = Compress.AUTO
    streams: Annotated[int, msgspec.Meta(ge=1, le=MAX_STREAMS)] | None = None
    goal: Goal | None = None
    blocks: Literal["auto", "off"] = "auto"

    @property
    def throttles(self) -> bool:
        """Whether the guest's writers may be held back, which only rounds without a post-copy after them call for."""
        return self.throttle and self.method is Method.PRE_COPY
