"""From whom memory is taken when the host needs it: shares per page, with a tax on idle memory.

Of all VMs that one gives next that has the least shares for each page that it keeps, where a page that it does not use
counts for more than one that it does: with a tax of 75 %, for four. A VM that uses all it has is thus robbed last, and
one that hoards first, however many shares it has short of four times as many. Nobody is taken below what is reserved
for him, nor while he misses what was taken already.

Source: Waldspurger, Memory Resource Management in VMware ESX Server, OSDI 2002, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 16 << 20
"""Bytes that are taken from one before it is looked again who is next."""
TAX = 0.75


@dataclass(frozen=True, slots=True)
class Holder:
    """A VM: bytes resident, of them ``kept`` in any case; the part of it in use, 0 to 1; its shares."""

    vm: str
    resident: int
    kept: int
    active: float
    shares: float
    backs_off: bool = False


def victims(holders: Sequence[Holder], need: int, tax: float = TAX) -> dict[str, int]:
    """How much to take from whom, in bytes, so that it is ``need`` together; less where there is not so much."""
    cost = 1 / (1 - tax)
    left = {one.vm: one.resident for one in holders if not one.backs_off}
    by_name = {one.vm: one for one in holders}
    taken: dict[str, int] = {}
    while need > 0:
        able = [vm for vm in left if left[vm] > by_name[vm].kept]
        if not able:
            break

        def worth(vm: str) -> tuple[float, str]:
            one = by_name[vm]
            # What is taken is idle as long as there is any.
            active = min(1.0, one.active * one.resident / left[vm])
            return one.shares / (left[vm] * (active + cost * (1 - active))), vm

        vm = min(able, key=worth)
        part = min(CHUNK, need, left[vm] - by_name[vm].kept)
        left[vm] -= part
        need -= part
        taken[vm] = taken.get(vm, 0) + part
    return taken
