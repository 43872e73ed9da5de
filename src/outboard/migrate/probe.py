"""Asking a destination for a plan: could it take the VM, and how fast is the way there?

On one connection to its agent's peer port: the source says ``probe``; the destination answers ``probed`` with what
stands in the way. Then the source sends a burst of raw bytes, a megabyte or a tenth of a second of them, and the
destination answers ``carried`` with how many came in what time, by its own clock; five times, since a host that has
something else to do makes any one of them look slow.
"""

from __future__ import annotations

import time
from pathlib import Path

from outboard.errors import PeerError
from outboard.migrate import messages
from outboard.migrate.desk import Destination
from outboard.wire import tls
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind

_STEP_S = 30.0
BURSTS = 5
_BURST_BYTES, _BURST_S = 1 << 20, 0.1
_TAKEN_BYTES, _TAKEN_S = 4 * _BURST_BYTES, 10.0
"""What a destination puts up with."""
_PART = bytes(64 << 10)
_TOO_SHORT_S = 1e-4


def ask(destination: Destination, identity: Path, probe: messages.Probe) -> tuple[messages.Probed, list[float]]:
    """What the destination's agent says, and the bursts' rates in bytes/s, as far as they could be measured.

    :param identity: the directory of this host's TLS identity.
    :raise UnreachableError: nobody answers. :raise NotAuthorisedError: it is not who was meant, or takes no VM of ours.
    :raise PeerError: it broke the protocol.
    """
    with tls.connect(destination.address, destination.port, identity, destination.name, _STEP_S) as agent:
        agent.send_message(messages.encode(probe))
        probed = messages.expect(agent.receive(_STEP_S).payload, messages.Probed)
        rates = [rate for _ in range(BURSTS) if (rate := _burst(agent)) is not None]
    return probed, rates


def _burst(agent: Channel) -> float | None:
    began, sent = time.monotonic(), 0
    while sent < _BURST_BYTES and time.monotonic() - began < _BURST_S:
        agent.send_stream(memoryview(_PART))
        sent += len(_PART)
    agent.send_stream(memoryview(b""))
    carried = messages.expect(agent.receive(_STEP_S).payload, messages.Carried)
    if not 0 < carried.octets <= sent or not carried.seconds >= _TOO_SHORT_S:
        return None
    return carried.octets / carried.seconds


def take_burst(channel: Channel) -> messages.Carried:
    """Be the destination: take the burst in.

    :raise PeerError: it is no burst, or does not end. :raise UnreachableError: the source is gone.
    """
    deadline = time.monotonic() + _TAKEN_S
    first = None
    octets = 0
    last = 0.0
    while True:
        frame = channel.receive(_STEP_S)
        last = time.monotonic()
        if frame.kind is not Kind.STREAM:
            raise PeerError(f"a {frame.kind.name} frame came in a probe's burst")
        if not len(frame.payload):
            break
        if first is None:
            # How long the first part took is not known.
            first = last
        else:
            octets += len(frame.payload)
        if octets > _TAKEN_BYTES or last > deadline:
            raise PeerError(f"a probe's burst does not end: {octets} bytes so far")
    return messages.Carried(octets=octets, seconds=0.0 if first is None else last - first)
