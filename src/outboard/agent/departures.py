"""VMs on their way from here: their migrations, and what happens when an engine dies on one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
import structlog

from outboard.agent.config import AgentConfig
from outboard.agent.engine import DEPARTING, PAUSED
from outboard.agent.engines import Engines
from outboard.agent.history import History
from outboard.agent.migrations import Migrations, Running
from outboard.agent.planning import Planning, past_of
from outboard.agent.succession import left_task, only_one
from outboard.agent.tasks import Depart, Refused
from outboard.errors import NotFoundError, OutboardError, RefusedError, error_of
from outboard.migrate.method import Options
from outboard.migrate.plan import Blocker, Plan
from outboard.migrate.report import Summary
from outboard.vmm.brake import release_left_over
from outboard.vmm.device_state import take_back
from outboard.vmm.registry import Registry, VmRecord

log = structlog.get_logger()


class Departures:
    """The migrations that begin here.

    :param managed: whether a VM's memory is managed here, or about to be.

    ``running`` has those that are remembered.

    Synchronization: the agent's event loop; :meth:`adopt` hands over to it.
    """

    def __init__(
        self,
        config: AgentConfig,
        registry: Registry,
        engines: Engines,
        history: History,
        managed: Callable[[VmRecord], bool],
    ) -> None:
        self.running = Migrations()
        self._managed = managed
        self._config, self._registry, self._engines, self._history = config, registry, engines, history
        self._tasks: set[asyncio.Task[None]] = set()
        self._planned: set[str] = set()

    def is_migrating(self, vm: str) -> bool:
        """Whether a VM is on its way."""
        return any(running.vm == vm for running in self.running.active())

    def depart(self, vm: str, host: str, options: Options) -> Running:
        """Begin a migration.

        :raise NotFoundError: no such VM or host.
        :raise RefusedError: ``migrating``: that VM is already on its way; ``managed``; ``planning``;
            ``given-away``: it has left.
        """
        target = self._config.find(host)
        record = self._registry.get(vm)
        self._check(record)
        migration = secrets.token_hex(8)
        task = Depart(
            migration=migration,
            vm=record.name,
            source=self._config.name,
            destination=target,
            options=options,
            began=time.monotonic(),
            throttle_gain=self._history.throttle_gain(record.name),
        )
        log.info("migration begins", migration=migration, vm=record.name, host=target.name)
        return self._begin(task)

    async def plan(self, vm: str, host: str, options: Options) -> Plan:
        """What a migration would do. Nothing is moved, and what stands in the way is in the plan.

        :raise NotFoundError: no such VM or host.
        :raise OutboardError: the engine that plans has ended.
        """
        target = self._config.find(host)
        record = self._registry.get(vm)
        blockers = []
        try:
            self._check(record)
        except RefusedError as error:
            blockers.append(Blocker(self._config.name, error.reason, str(error)))
        past = past_of(self._history, vm, host)
        task = Planning(vm, self._config.name, target, options, past, blockers)
        log.info("plan begins", vm=vm, host=host)
        # One that something stands in the way of is not watched.
        watched = set() if blockers else {vm}
        self._planned |= watched
        try:
            return await asyncio.to_thread(_planned_by, self._engines.start(task))
        finally:
            self._planned -= watched

    def _check(self, record: VmRecord) -> None:
        """See that nothing is known to stand in the way of the VM's departure; errors as :meth:`depart`."""
        if record.name in self._planned:
            raise RefusedError(
                "planning", f"{record.name} is being watched for a plan, for some seconds; then migrate it"
            )
        if self.is_migrating(record.name):
            raise RefusedError(
                "migrating", f"{record.name} is being migrated already; outboard cancel {record.name} stops that"
            )
        if self._managed(record):
            raise RefusedError(
                "managed",
                f"the memory of {record.name} is managed, some of it may be away; outboard release {record.name} "
                "brings it back, then migrate",
            )
        given = left_task(record.directory / DEPARTING, Depart)
        if given is not None:
            raise RefusedError(
                "given-away",
                f"{record.name} was given to {given.destination.name} by migration {given.migration}, and stands still "
                f"here; outboard explain {given.migration} says why. Only if it does not run there: remove "
                f"{record.directory / DEPARTING} and let QEMU go on (QMP cont), or outboard stop {record.name}",
            )

    def _begin(self, task: Depart) -> Running:
        running = self.running.add(
            task.migration, task.vm, self._engines.start(task), lambda: self._succeed_departing(task)
        )
        self._follow(running)
        return running

    def _succeed_departing(self, task: Depart) -> Connection | None:
        """The engine of a migration has died: another goes on if the VM was given away, else it runs on here."""
        try:
            record = self._registry.get(task.vm)
        except NotFoundError:
            return None
        self.let_go(task.vm)
        if not record.alive:
            return None
        if left_task(record.directory / DEPARTING, Depart) is None:
            threading.Thread(target=self._take_back, args=(record,), daemon=True).start()
            return None
        log.warning("an engine died, another takes over", migration=task.migration, vm=task.vm)
        return self._engines.start(msgspec.structs.replace(task, again=True))

    def _take_back(self, record: VmRecord) -> None:
        try:
            with record.attach() as guest:
                take_back(guest.monitor, run=not (record.directory / DEPARTING / PAUSED).exists())
            shutil.rmtree(record.directory / DEPARTING, ignore_errors=True)
        except OutboardError as error:
            log.error("a VM whose migration died may stand still", vm=record.name, why=str(error))

    def _follow(self, running: Running) -> None:
        async def keep() -> None:
            async for report in running.reports():
                kind = msgspec.json.decode(report)
                if kind.get("schema", "").startswith("outboard.migration.summary"):
                    self._history.keep(msgspec.json.decode(report, type=Summary))
                    log.info("migration ends", migration=running.migration, state=kind["state"], error=kind["error"])
            # An engine that was killed has left its hold on.
            self.let_go(running.vm)

        task = asyncio.create_task(keep())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def let_go(self, vm: str) -> None:
        """Hold nothing back in a VM that no migration holds."""
        with contextlib.suppress(OutboardError):
            left = release_left_over(self._registry.get(vm).pid)
            if left:
                log.warning("let go of held vCPUs", vm=vm, vcpus=left)

    def adopt(self, record: VmRecord, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end of the engine that sends the VM away, if there is one, and see to what it leaves."""
        journal = record.directory / DEPARTING
        try:
            os.close(only_one(journal, wait=True))
        except FileNotFoundError:
            return
        leaving = left_task(journal, Depart)
        if leaving is not None:
            loop.call_soon_threadsafe(self._begin, msgspec.structs.replace(leaving, again=True))
        elif journal.exists():
            self._take_back(record)


def _planned_by(pipe: Connection) -> Plan:
    """The plan that an engine makes; in a thread that waits for it.

    :raise OutboardError: it has ended without one.
    """
    with contextlib.closing(pipe):
        try:
            report = pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise OutboardError("the engine that made the plan has died; nothing was moved, ask again") from error
    try:
        return msgspec.json.decode(report, type=Plan)
    except msgspec.ValidationError:
        refused = msgspec.json.decode(report, type=Refused)
        raise error_of(refused.exit_code, refused.why) from None
