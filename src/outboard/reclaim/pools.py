"""Resource pools: who may have how much of the swap reservation, and whose memory goes first.

A pool is named by its path, ``prod`` or ``prod/web``; all are below the root, which is the whole reservation. Each has
a *reservation*, set aside for its VMs whether or not they use it, a *limit* that its VMs and the pools below it keep to
together, and *shares*, which say how much of its memory a VM keeps against others when memory is scarce.

What a VM could ever have swapped out (its memory but for its own memory reservation) is promised to it when it starts.
What a pool needs is the larger of its reservation and what is promised in it and below. A VM is admitted when every
pool from its own up to the root stays within its limit, the root's being the reservation on the disk: then no swap-out
can want a block that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from outboard.errors import RefusedError, SpecError
from outboard.vmm.spec import parse_size

ROOT = ""
SHARES = 1000


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pool as it is written in agent.toml: ``[pools.prod]`` or ``[pools."prod/web"]``."""

    reservation: str | None = None
    limit: str | None = None
    shares: int = SHARES

    def __post_init__(self) -> None:
        if self.shares < 1:
            raise ValueError(f"shares = {self.shares}: must be 1 or more")
        if self.limit is not None and self.limit_bytes < self.reserved_bytes:
            raise ValueError(f"limit = {self.limit!r} is less than its reservation, {self.reservation!r}")

    @property
    def reserved_bytes(self) -> int:
        """What is set aside."""
        return 0 if self.reservation is None else parse_size(self.reservation)

    @property
    def limit_bytes(self) -> float:
        """The most; infinite if it is only the pool above that limits."""
        return float("inf") if self.limit is None else parse_size(self.limit)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a VM could have swapped out, in bytes, and its pool."""

    pool: str
    size: int


@dataclass(frozen=True, slots=True)
class PoolUse:
    """``promised`` in the pool and below, ``needed`` with what is set aside; in bytes.

    ``limit`` is None where only the pool above limits.
    """

    pool: str
    reservation: int
    limit: int | None
    shares: int
    promised: int
    needed: int


class Pools:
    """The pools of a host.

    :param size: of the reservation on the disk, in bytes.
    :raise SpecError: a pool is below none, or what is set aside does not fit.

    Synchronization: immutable.
    """

    def __init__(self, size: int, pools: Mapping[str, Pool]) -> None:
        self.size = size
        self._pools = dict(pools)
        for path in pools:
            above = _above(path)
            if not all(path.split("/")) or above not in (ROOT, *pools):
                raise SpecError(f"pool {path!r} is below {above!r}, and there is no such pool; write [pools.{above}]")
        for path in (ROOT, *pools):
            needed = sum(self._needed(child, {}) for child in self._below(path))
            if needed > self._limit(path):
                raise SpecError(
                    f"the pools below {path or 'the reservation'} reserve {_mib(needed)}, and it has "
                    f"{_mib(int(self._limit(path)))}"
                )

    def _limit(self, path: str) -> float:
        return self.size if path == ROOT else self._pools[path].limit_bytes

    def _below(self, path: str) -> list[str]:
        return [child for child in self._pools if _above(child) == path]

    def _promised(self, path: str, promises: Mapping[str, Promise]) -> int:
        return sum(one.size for one in promises.values() if one.pool == path)

    def _needed(self, path: str, promises: Mapping[str, Promise]) -> int:
        wanted = self._promised(path, promises) + sum(self._needed(child, promises) for child in self._below(path))
        return wanted if path == ROOT else max(wanted, self._pools[path].reserved_bytes)

    def require(self, pool: str) -> None:
        """Refuse the name of a pool that there is not.

        :raise RefusedError: ``no-pool``.
        """
        if pool not in (ROOT, *self._pools):
            known = ", ".join(sorted(self._pools)) or "none"
            raise RefusedError("no-pool", f"there is no pool {pool!r} on this host (known: {known})")

    def admit(self, vm: str, wanted: Promise, promises: Mapping[str, Promise]) -> None:
        """Refuse a VM that could outgrow what is reserved.

        :param promises: to all other VMs of this host, by name.
        :raise RefusedError: ``swap-reservation``, ``no-pool``.
        """
        self.require(wanted.pool)
        others = {name: one for name, one in promises.items() if name != vm}
        path = wanted.pool
        while True:
            needed, limit = self._needed(path, {**others, vm: wanted}), self._limit(path)
            if needed > limit:
                held = self._needed(path, others)
                what = f"pool {path} (limit)" if path else "the swap reservation"
                raise RefusedError(
                    "swap-reservation",
                    f"{vm} could have {_mib(wanted.size)} swapped out; {what} is {_mib(int(limit))}, of which "
                    f"{_mib(held)} are spoken for and {_mib(max(0, int(limit) - held))} left; give the VM a larger "
                    "memory_reservation, end another, or reserve more in agent.toml",
                )
            if path == ROOT:
                return
            path = _above(path)

    def shares(self, pool: str, promises: Mapping[str, Promise]) -> float:
        """What one MiB of a VM in ``pool`` counts for beside others': shares divide from the root down."""
        share = 1.0
        while pool != ROOT:
            above = _above(pool)
            all_ = sum(self._pools[one].shares for one in self._below(above))
            # VMs that lie beside pools count as one pool of the usual shares.
            beside = SHARES if self._promised(above, promises) else 0
            share *= self._pools[pool].shares / (all_ + beside)
            pool = above
        return share

    def use(self, promises: Mapping[str, Promise]) -> list[PoolUse]:
        """How each pool is used, the root first."""

        def total(path: str) -> int:
            return self._promised(path, promises) + sum(total(child) for child in self._below(path))

        root = PoolUse(ROOT, self.size, self.size, SHARES, total(ROOT), self._needed(ROOT, promises))
        return [root] + [
            PoolUse(
                path,
                pool.reserved_bytes,
                None if pool.limit is None else parse_size(pool.limit),
                pool.shares,
                total(path),
                self._needed(path, promises),
            )
            for path, pool in sorted(self._pools.items())
        ]


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
