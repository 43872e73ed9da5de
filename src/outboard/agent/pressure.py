"""Reclaim when tasks of this host wait for memory: a thread of the agent's that the kernel wakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from outboard.agent.orders import Look, Looked, Reclaim, ask
from outboard.agent.promises import promise_of, promises
from outboard.errors import KernelError, OutboardError
from outboard.linux import proc, psi
from outboard.reclaim.pools import Pools
from outboard.reclaim.relief import Relief
from outboard.reclaim.victims import Holder
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import parse_spec

WINDOW_US = 2_000_000
_ACTIVE = 0.5
"""Of a VM that has not been looked at."""
_ASK_S = 30.0
log = structlog.get_logger()


class Source(Protocol):
    """What tells of pressure: :class:`~outboard.linux.psi.Trigger`, or a recorded one."""

    def wait(self, seconds: float) -> bool:
        """Wait for the pressure; whether it came within ``seconds``."""


class Pressure:
    """Reclaims memory of the VMs of ``registry`` while ``source`` tells of pressure.

    :param ensure: see to it that a VM is managed; where its engine takes orders. :param moving: VMs on their way.

    Synchronization: :meth:`run` in a thread of its own.
    """

    def __init__(
        self, pools: Pools, registry: Registry, ensure: Callable[[str], Path], moving: Callable[[str], bool]
    ) -> None:
        self._pools, self._registry, self._ensure, self._moving = pools, registry, ensure, moving
        self._relief = Relief(proc.meminfo()["MemTotal"])

    def start(self, stall_ms: int) -> None:
        """Begin, if the kernel tells of pressure."""
        why_not = psi.why_not()
        if why_not is not None:
            log.error("memory is not reclaimed by itself", why=why_not)
            return
        trigger = psi.Trigger(stall_ms * 1000, WINDOW_US)
        threading.Thread(target=self.run, args=(trigger,), daemon=True, name="pressure").start()

    def run(self, source: Source) -> None:
        """Reclaim whenever there is pressure, until the source ends."""
        while True:
            try:
                pressed = source.wait(1.0)
            except KernelError as error:
                log.error("memory is reclaimed by itself no more", why=str(error))
                return
            now = time.monotonic()
            if pressed:
                for vm, target in self._relief.press(self._holders(), now).items():
                    self._order(vm, target)
            else:
                for vm in self._relief.calm(now):
                    self._order(vm, None)

    def _order(self, vm: str, target: int | None) -> None:
        try:
            ask(self._ensure(vm), Reclaim(target=target), _ASK_S)
        except OutboardError as error:
            log.warning("memory is not reclaimed", vm=vm, why=str(error))
        else:
            log.info("memory is reclaimed", vm=vm, target=target)

    def _holders(self) -> list[Holder]:
        found = []
        promised = promises(self._registry)
        for record in self._registry.list():
            if record.alive and not self._moving(record.name):
                try:
                    spec = parse_spec(record.spec_text(), f"the spec of {record.name}")
                    if not promise_of(spec).size:
                        continue
                    looked = ask(self._ensure(record.name), Look(), _ASK_S)
                except (OutboardError, FileNotFoundError) as error:
                    log.warning("memory is not reclaimed", vm=record.name, why=str(error))
                    continue
                shares = self._pools.shares(spec.pool or "", promised)
                found.append(_holder(record, looked, spec.memory_bytes - spec.reclaimable_bytes, shares))
        return found


def _holder(record: VmRecord, looked: Looked, kept: int, shares: float) -> Holder:
    active = _ACTIVE
    if looked.idle is not None and looked.used:
        active = min(1.0, max(0.0, 1 - looked.idle / looked.used))
    backs_off = looked.reclaim is not None and looked.reclaim.goal > looked.reclaim.target
    return Holder(record.name, looked.used, kept, active, shares, backs_off)
