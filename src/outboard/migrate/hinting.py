"""Asking a guest for its hints, in a process of its own: the engine prepares the destination meanwhile.

The guest's answer takes as long as a busy guest lets its agent wait, and comes in pieces. Each is ranked in the outbox
here and then named to the engine, which may order the bulk to send it; nobody walks pages that are being ranked.
"""

from __future__ import annotations

import socket
import time

import msgspec

from outboard.errors import PeerError, UnreachableError
from outboard.migrate import ranking
from outboard.migrate.outbox import Outbox
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
