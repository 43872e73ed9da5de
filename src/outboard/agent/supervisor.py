"""Keeps an engine running for each VM of this host whose memory is managed.

Whether a VM is managed is not ours to remember: the journal's directory is there while it is. An engine that dies is
replaced, also one that an earlier agent started; a guest that waits for a page waits no longer than that takes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import structlog

from outboard.agent.config import AgentConfig, snapshot_dir
from outboard.agent.engine import ARRIVING, end_broken
from outboard.agent.engines import first_answer
from outboard.agent.holding import CONTROL
from outboard.agent.orders import Look, ask
from outboard.agent.promises import pools_of, promises
from outboard.agent.restoring import is_broken
from outboard.agent.swapping import PlainSwap, ReservedSwap, Swapping
from outboard.agent.tasks import Manage, Restore
from outboard.errors import KernelError, NotFoundError, OutboardError, UnreachableError
from outboard.linux import pidfd
from outboard.stores.reservation import Reservation
from outboard.stores.snapshot import open_chain
from outboard.vmm.device_state import awaits_state
from outboard.vmm.launch import end_unrecorded
from outboard.vmm.registry import Registry
from outboard.vmm.spec import VmSpec, parse_spec

_READY_S = 30.0
_RESTORE_S = 600.0
_RETRY_S = 1.0

log = structlog.get_logger()


class Supervisor:
    """The engines of the managed VMs.

    :param start: starts an engine for a task; its pipe.
    :param swap: the directory of the swap files; :param config: the host's, whose reservation takes their place if it
        has one.

    Synchronization: any thread; what is done for one VM does not wait for another.
    """

    def __init__(
        self,
        start: Callable[[Manage | Restore], Connection],
        registry: Registry,
        swap: Path,
        config: AgentConfig | None = None,
    ) -> None:
        self._start = start
        self._registry = registry
        self._swap = swap
        self._reserved = None if config is None else config.swap
        self._pools = None if config is None else pools_of(config)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._watched: dict[str, int] = {}

    def adopt(self) -> None:
        """Find the VMs that are managed, or were when an earlier agent ended."""
        for record in self._registry.list():
            if record.alive and record.memory_directory.exists():
                try:
                    self.ensure(record.name)
                except OutboardError as error:
                    log.error("a managed VM has no engine", vm=record.name, why=str(error))

    def ensure(self, vm: str) -> Path:
        """See to it that an engine manages ``vm``; where it takes orders.

        :raise NotFoundError: no such VM.
        :raise OutboardError: it cannot be managed, and why.
        """
        with self._locks[vm]:
            path = self._registry.get(vm).memory_directory / CONTROL
            try:
                engine = ask(path, Look(), timeout=5.0).engine
            except UnreachableError:
                engine = self._run(vm, successor=False)
            self._watch(vm, engine)
            return path

    def restore(self, vm: str, snapshot: str, *, eager: bool) -> int:
        """Begin a VM with what a snapshot has; the pid of the engine that manages it.

        :raise RefusedError: ``name-taken``; ``damaged-snapshot``; and why else it cannot be.
        :raise NotFoundError: there is no such snapshot.
        """
        with self._locks[vm]:
            contents = open_chain(snapshot_dir(), snapshot)[0]
            spec = parse_spec(contents.meta.spec, f"the description of {snapshot}")
            swap = self._swapping(msgspec.structs.replace(spec, name=vm))
            pipe = self._start(Restore(vm=vm, snapshot=snapshot, spec=contents.meta.spec, swap=swap, eager=eager))
            try:
                engine = self._answer(pipe, _RESTORE_S, vm)
            except UnreachableError:
                self._end_broken(vm)
                raise
            self._watch(vm, engine)
            return engine

    def _end_broken(self, vm: str) -> None:
        """End a VM that was being restored by an engine that died."""
        with contextlib.suppress(OutboardError):
            end_unrecorded(vm, self._registry)
            record = self._registry.get(vm)
            # Nothing but such a VM: the engine may have died before it found the name taken.
            coming = awaits_state(record) and not (record.directory / ARRIVING).exists()
            if is_broken(record.memory_directory) or coming:
                end_broken(record, self._registry)

    def upgrade(self, vm: str) -> int:
        """Have a new engine take ``vm`` over from the one that manages it; its pid.

        :raise NotFoundError: no such VM, or nobody manages it.
        """
        with self._locks[vm]:
            self._registry.get(vm)
            if not self._managed(vm):
                raise NotFoundError(f"the memory of {vm} is not managed; outboard evict {vm} begins that")
            engine = self._run(vm, successor=True)
            self._watch(vm, engine)
            return engine

    def _run(self, vm: str, *, successor: bool) -> int:
        self._admit(vm)
        spec = parse_spec(self._registry.get(vm).spec_text(), f"the spec of {vm}")
        pipe = self._start(Manage(vm=vm, swap=self._swapping(spec), successor=successor))
        return self._answer(pipe, _READY_S, vm)

    def _answer(self, pipe: Connection, patience_s: float, vm: str) -> int:
        """Wait until an engine manages ``vm``; its pid."""
        engine = first_answer(pipe, patience_s, f"the engine that was to manage {vm}")
        log.info("memory is managed", vm=vm, engine=engine)
        return engine

    def _admit(self, vm: str) -> None:
        """A VM that was started before anything was reserved is looked at when it is first managed.

        :raise RefusedError: ``swap-reservation``, ``no-pool``.
        """
        if self._pools is not None and not self._managed(vm):
            all_ = promises(self._registry)
            self._pools.admit(vm, all_[vm], all_)

    def _swapping(self, spec: VmSpec) -> Swapping:
        kept = spec.memory_bytes - spec.reclaimable_bytes
        if self._reserved is None:
            return PlainSwap(os.fspath(self._swap / spec.name), kept)
        return ReservedSwap(os.fspath(self._reserved.place), self._reserved.reservation_bytes, spec.name, kept)

    def reserve(self) -> None:
        """Make the swap reservation if there is to be one, and take back what VMs had of it that are gone.

        :raise RefusedError, KernelError: as :class:`~outboard.stores.reservation.Reservation`.
        """
        if self._reserved is None:
            return
        reserved = self._reserved
        with contextlib.closing(
            Reservation(reserved.place, reserved.reservation_bytes, thin=reserved.thin)
        ) as reservation:
            for vm in sorted(reservation.names()):
                with self._locks[vm]:
                    if not self._managed(vm):
                        reservation.discard(vm)
            now = reservation.statistics()
        log.info("swap is reserved", mebibytes=now.promisable >> 20, way=now.way, blocks=now.blocks)

    def _watch(self, vm: str, engine: int) -> None:
        if self._watched.get(vm) != engine:
            self._watched[vm] = engine
            threading.Thread(target=self._await_end, args=(vm, engine), daemon=True).start()

    def _await_end(self, vm: str, engine: int) -> None:
        try:
            process = pidfd.open(engine)
        except KernelError:
            # It has ended already.
            pass
        else:
            pidfd.wait(process, None)
            pidfd.close(process)
        with self._locks[vm]:
            if self._watched.get(vm) != engine:
                return
            del self._watched[vm]
            if not self._managed(vm):
                log.info("memory is managed no more", vm=vm)
                if self._reserved is not None:
                    # Its engine may have died before it could.
                    ReservedSwap(os.fspath(self._reserved.place), self._reserved.reservation_bytes, vm).remove()
                return
        self._replace(vm, engine)

    def _managed(self, vm: str) -> bool:
        try:
            return self._registry.get(vm).memory_directory.exists()
        except NotFoundError:
            return False

    def _replace(self, vm: str, engine: int) -> None:
        log.warning("an engine died, another takes over", vm=vm, engine=engine)
        while self._managed(vm):
            try:
                self.ensure(vm)
                return
            except OutboardError as error:
                # Its pages wait for somebody; what is in the way may be mended.
                log.error("a managed VM has no engine", vm=vm, why=str(error))
                time.sleep(_RETRY_S)
