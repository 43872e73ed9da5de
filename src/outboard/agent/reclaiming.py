"""Reclaim in the engine of a managed guest: a controller says how much, what is idle and was touched least goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from outboard.agent.orders import Reclaim, Reclaiming
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import PageSet
from outboard.reclaim.controller import Controller, Reading
from outboard.trace.idle import IdleTrace
from outboard.vmm.guest import Guest

_KEPT = "reclaim.json"
WINDOW_S = 2.0
"""For how long a page must not have been touched."""


class Reclaimer:
    """Reclaims the memory of ``guest``, when :meth:`work` is called now and then.

    :param directory: where a successor finds what was asked for.
    :param evict: puts up to so many bytes of some pages away, the coldest first; how many pages went.

    Synchronization: one thread.
    """

    def __init__(self, guest: Guest, directory: Path, evict: Callable[[PageSet, int], int]) -> None:
        self._guest, self._directory, self._evict = guest, directory, evict
        self._controller: Controller | None = None
        self._window: tuple[IdleTrace, float, int] | None = None
        self.idle: int | None = None
        """Bytes that were idle when it was looked last."""
        kept = directory / _KEPT
        if kept.exists():
            self.steer(msgspec.json.decode(kept.read_bytes(), type=Reclaim))

    def steer(self, order: Reclaim) -> None:
        """Aim at another target from now on, or at none."""
        kept = self._directory / _KEPT
        self._window = None
        if order.target is None:
            self._controller = None
            kept.unlink(missing_ok=True)
            return
        self._controller = Controller(order.target, order.most_refaults)
        fresh = kept.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(order))
        fresh.rename(kept)

    @property
    def status(self) -> Reclaiming | None:
        """What is aimed at; None: nothing."""
        one = self._controller
        return None if one is None else Reclaiming(one.target, one.goal, one.refault_rate)

    def work(self, now: float, resident: Callable[[], int], refaults: int) -> None:
        """Do what is due.

        :param now: CLOCK_MONOTONIC; :param resident: tells the bytes that the guest has in memory.
        """
        if self._controller is None:
            return
        if self._window is not None:
            trace, due, wanted = self._window
            if now < due:
                return
            self._window = None
            idle = trace.idle()
            self.idle = len(idle & self._guest.memory.populated()) * PAGE_SIZE
            self._evict(idle, wanted)
        memory = self._guest.pages * PAGE_SIZE
        wanted = self._controller.step(Reading(now, memory, resident(), refaults))
        if wanted:
            self._window = IdleTrace(self._guest), now + WINDOW_S, wanted
