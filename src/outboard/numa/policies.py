"""In what order a guest's memory follows its vCPUs to a node: policies as data, and what to move next by each.

Memory is counted in units, of a small or of a large page; a large page moves whole. Heat is accesses per second of
each unit, as ``pages.heat`` has it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

ABSENT, UNKNOWN = -1, -2
"""The node of a unit that is on none: never touched, or in a store. It is left alone. And of one that has not been
asked about yet: it may have to move."""
_BREAK_HEAT, _BREAK_SIZE = 0.95, 1 / 8


class Policy(msgspec.Struct, frozen=True):
    """A policy.

    :param use: when to use it.
    :param hot: the hottest units that have this part of all accesses are the hot set.
    :param tail: what becomes of the rest: it follows at once, at a rate limit, or stays.
    :param until: stop when at most this part of the accesses is remote.
    :param room: where the node is full, colder units of this guest leave it first.
    """

    name: str
    use: str
    order: Literal["heat", "writes", "address"]
    hot: float = 1.0
    tail: Literal["follow", "idle", "stay"] = "follow"
    until: float = 0.0
    room: bool = False


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(
            "hottest-first",
            "The rule: the node has room for all of the guest, and accesses shall become local as soon as possible.",
            "heat",
        ),
        Policy(
            "hot-set",
            "Other guests need the bandwidth: the hot set goes at once, the rest in the background at a rate limit.",
            "heat",
            hot=0.95,
            tail="idle",
        ),
        Policy(
            "until-local",
            "The placement may not last: move only until less than a tenth of the accesses is remote.",
            "heat",
            until=0.1,
            tail="stay",
        ),
        Policy(
            "short-of-memory",
            "The node has no room for all: only the hot set goes, and cold units of the guest leave to make room.",
            "heat",
            hot=0.95,
            tail="stay",
            room=True,
        ),
        Policy(
            "writes-first",
            "Remote writes cost more than reads, as on memory behind CXL or under a full link: the written goes first.",
            "writes",
        ),
        Policy(
            "address",
            "No heat is known, or to compare with: what migratepages(8) does.",
            "address",
        ),
    )
}


class Memory(NamedTuple):
    """A guest's memory: for each unit, accesses per second, writes per second, and the node it is on.

    ``urgent``: units that go before all others, such as the guest's page tables and kernel where it tells of them.
    """

    heat: NDArray[np.float64]
    writes: NDArray[np.float64]
    node: NDArray[np.int16]
    urgent: NDArray[np.bool_] | None = None


def only(memory: Memory, which: NDArray[np.bool_]) -> Memory:
    """What is known of some units; of the others nothing is, and they stay where they are."""
    return Memory(
        np.where(which, memory.heat, 0.0),
        np.where(which, memory.writes, 0.0),
        np.where(which, memory.node, ABSENT).astype(np.int16),
        None if memory.urgent is None else memory.urgent & which,
    )


def local_share(memory: Memory, node: int) -> float:
    """The part of the accesses that are to memory on a node; 1 where there are none."""
    total = float(memory.heat.sum())
    return float(memory.heat[memory.node == node].sum()) / total if total else 1.0


def order_of(policy: Policy, memory: Memory, to: int, resting: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """The units to move, first one first, and how many of them are no tail."""
    moves = (memory.node != to) & (memory.node != ABSENT) & ~resting
    if policy.order == "address":
        moving = np.flatnonzero(moves)
        return moving, moving.size
    # Most of a guest is cold, and needs no sorting.
    warm = np.flatnonzero(memory.heat > 0)
    hottest = warm[np.argsort(-memory.heat[warm], kind="stable")]
    share = np.cumsum(memory.heat[hottest])
    # Those before which less than the hot set's share has been reached: the one that completes it belongs to it.
    most = int(np.count_nonzero(share - memory.heat[hottest] < policy.hot * memory.heat.sum()))
    parts = [hottest[:most], np.concatenate((hottest[most:], np.flatnonzero(memory.heat <= 0)))]
    if policy.order == "writes":
        parts = [part[np.argsort(-memory.writes[part], kind="stable")] for part in parts]
    hot, rest = (part[moves[part]] for part in parts)
    if memory.urgent is None:
        return np.concatenate((hot, rest)), hot.size
    urgent = [part[memory.urgent[part]] for part in (hot, rest)]
    calm = [part[~memory.urgent[part]] for part in (hot, rest)]
    return np.concatenate(urgent + calm), sum(part.size for part in (*urgent, calm[0]))


def worth_breaking(heat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which large pages to break before their hot part moves, where the node is short of memory; else none is broken.

    :param heat: a row for each large page, a column for each small page in it.
    :return: those nearly all of whose accesses (95 %) are to an eighth of their small pages or less.
    """
    few = int(heat.shape[1] * _BREAK_SIZE)
    total = heat.sum(axis=1)
    hottest = -np.partition(-heat, max(0, few - 1), axis=1)[:, :few].sum(axis=1)
    return np.asarray((total > 0) & (hottest >= _BREAK_HEAT * total))
