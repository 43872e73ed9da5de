"""What each guest could gain by moving alone, with all the others where they are now.

Guests move one by one, each when its gain has lasted, so the best placement of all at once says little about a single
move: the processor that a guest would get may still be another's. Whatever a move makes worse for others counts
against it; so each move that is made makes the whole better, though two guests that would have to change places do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from outboard.errors import UsageError
from outboard.numa.placement import Load, Model, Vcpu
from outboard.numa.settling import Offer
from outboard.numa.topology import Topology


class Proposal(NamedTuple):
    """An offer to a guest, and the processors of its vCPUs if it moves; the offer's keys are their nodes."""

    offer: Offer
    processors: list[int]


def proposals(
    topology: Topology, load: Load, vcpus: Sequence[Vcpu], prices: Mapping[str, float]
) -> dict[str, Proposal]:
    """What to propose to each guest.

    :param prices: seconds of each guest's time that moving takes; none: nothing.
    :raise UsageError: a vCPU runs nowhere yet: it needs a place and no proposal; or does not fit the host.
    """
    for one in vcpus:
        if one.processor < 0:
            raise UsageError(f"{one.guest}'s vCPU {one.number} runs nowhere yet; place it before it is balanced")
    model = Model(topology, load)
    node_of = {one.number: one.node for one in topology.processors}
    present = [one.processor for one in vcpus]

    def costs(processors: Sequence[int]) -> list[float]:
        return [one.rate * ns for one, ns in zip(vcpus, model.expected(vcpus, processors), strict=True)]

    now = costs(present)
    rows: dict[str, list[int]] = {}
    for row, one in enumerate(vcpus):
        rows.setdefault(one.guest, []).append(row)
    found = {}
    for guest, mine in rows.items():
        running = dict(load.running)
        for one in vcpus:
            if one.guest != guest:
                running[one.processor] = running.get(one.processor, 0) + 1
        alone = Model(topology, msgspec.structs.replace(load, running=running), len(vcpus) - len(mine))
        processors = alone.place([vcpus[row] for row in mine]).processors
        moved = list(present)
        for row, processor in zip(mine, processors, strict=True):
            moved[row] = processor
        own = sum(now[row] for row in mine)
        here, key = (tuple(node_of[where[row]] for row in mine) for where in (present, moved))
        offer = Offer(here, key, own, own - (sum(now) - sum(costs(moved))), prices.get(guest, 0.0))
        found[guest] = Proposal(offer, processors)
    return found
