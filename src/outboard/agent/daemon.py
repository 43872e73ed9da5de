"""The agent: one process a host, which starts engines and answers for them.

It listens twice. Other hosts reach it over mutual TLS on the peer port, where the one thing they can ask is to prepare
for a migration. The people of this host reach it over HTTP on a unix socket (``agent.sock``, mode 0660).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from outboard.agent import service
from outboard.agent.config import AgentConfig, socket_path, state_dir
from outboard.agent.engine import (
    ARRIVING,
    DEPARTING,
    REOPENED,
    Depart,
    Ended,
    Manage,
    Ready,
    Receive,
    Refused,
    run_engine,
)
from outboard.agent.history import History
from outboard.agent.migrations import Migrations, Running
from outboard.agent.succession import left_task, only_one
from outboard.agent.supervisor import Supervisor
from outboard.agent.verdicts import Verdicts
from outboard.errors import (
    NeedsRecoveryError,
    NotAuthorisedError,
    NotFoundError,
    OutboardError,
    PeerError,
    RefusedError,
    UnreachableError,
    UsageError,
    error_of,
)
from outboard.linux import sched
from outboard.migrate import messages
from outboard.migrate.method import Options
from outboard.migrate.report import Summary
from outboard.vmm.brake import release_left_over
from outboard.vmm.device_state import take_back
from outboard.vmm.launch import stop
from outboard.vmm.registry import Registry, VmRecord
from outboard.wire.channel import Channel
from outboard.wire.tls import Listener

_PREPARE_S = 30.0
_AGAIN_S = 1.0
"""Between the death of an engine that took over and the next."""

log = structlog.get_logger()


class MigrateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/migrations."""

    vm: str
    host: str
    options: Options = Options()


class LimitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PATCH /v1/migrations/ID: bytes/s, null is unlimited."""

    max_bandwidth: int | None


class Agent:
    """The daemon.

    :param config: this host's.
    :param identity: the directory of its TLS identity.

    Synchronization: the event loop of :meth:`serve`; the peer port's threads hand over to it.
    """

    def __init__(self, config: AgentConfig, identity: Path, registry: Registry) -> None:
        self._config = config
        self._identity = identity
        self._registry = registry
        self._migrations = Migrations()
        self._history = History(state_dir() / "history.db")
        self._verdicts = Verdicts(state_dir() / "incoming")
        self._engines = multiprocessing.get_context("forkserver")
        self._engines.set_forkserver_preload(["outboard.agent.engine", "click"])
        self._supervisor = Supervisor(self._start_engine, registry, state_dir() / "swap")
        self._engaging: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def _start_engine(self, task: Depart | Receive | Manage) -> Connection:
        ours, theirs = self._engines.Pipe()
        engine = self._engines.Process(
            target=run_engine,
            args=(msgspec.json.encode(task), theirs, os.fspath(self._registry.root), os.fspath(self._identity)),
        )
        engine.start()
        theirs.close()
        # Reaped when it ends; the agent does not wait for it.
        threading.Thread(target=engine.join, daemon=True).start()
        return ours

    def depart(self, request: MigrateRequest) -> Running:
        """Begin a migration.

        :raise NotFoundError: no such VM or host.
        :raise RefusedError: ``migrating``: that VM is already on its way; ``managed``; ``given-away``: it has left.
        """
        target = self._config.find(request.host)
        record = self._registry.get(request.vm)
        if any(running.vm == record.name for running in self._migrations.active()):
            raise RefusedError(
                "migrating", f"{record.name} is being migrated already; outboard cancel {record.name} stops that"
            )
        if record.memory_directory.exists() or record.name in self._engaging:
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
        migration = secrets.token_hex(8)
        task = Depart(
            migration=migration,
            vm=record.name,
            source=self._config.name,
            destination=target,
            options=request.options,
            began=time.monotonic(),
            throttle_gain=self._history.throttle_gain(record.name),
        )
        log.info("migration begins", migration=migration, vm=record.name, host=target.name)
        return self._begin(task)

    def _begin(self, task: Depart) -> Running:
        running = self._migrations.add(
            task.migration, task.vm, self._start_engine(task), lambda: self._succeed_departing(task)
        )
        self._follow(running)
        return running

    def _succeed_departing(self, task: Depart) -> Connection | None:
        """The engine of a migration has died: another goes on if the VM was given away, else it runs on here."""
        try:
            record = self._registry.get(task.vm)
        except NotFoundError:
            return None
        self._let_go(task.vm)
        if not record.alive:
            return None
        if left_task(record.directory / DEPARTING, Depart) is None:
            threading.Thread(target=self._take_back, args=(record,), daemon=True).start()
            return None
        log.warning("an engine died, another takes over", migration=task.migration, vm=task.vm)
        return self._start_engine(msgspec.structs.replace(task, again=True))

    def _take_back(self, record: VmRecord) -> None:
        try:
            with record.attach() as guest:
                take_back(guest.monitor)
            shutil.rmtree(record.directory / DEPARTING, ignore_errors=True)
        except OutboardError as error:
            log.error("a VM whose migration died may stand still", vm=record.name, why=str(error))

    def _adopt(self) -> None:
        """Find the migrations whose engines died while no agent was there."""
        loop = asyncio.get_running_loop()
        for record in self._registry.list():
            for name in (DEPARTING, ARRIVING):
                if (record.directory / name).exists():
                    threading.Thread(target=self._adopt_one, args=(record, name, loop), daemon=True).start()

    def _adopt_one(self, record: VmRecord, name: str, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end of the engine that is at work, if there is one, and see to what it leaves."""
        journal = record.directory / name
        try:
            os.close(only_one(journal, wait=True))
        except FileNotFoundError:
            return
        if name == DEPARTING:
            leaving = left_task(journal, Depart)
            if leaving is not None:
                loop.call_soon_threadsafe(self._begin, msgspec.structs.replace(leaving, again=True))
            elif journal.exists():
                self._take_back(record)
            return
        coming = left_task(journal, Receive)
        if coming is not None:
            self._succeed_receiving(coming)
        elif journal.exists():
            # It had not come so far that the VM could have been ours.
            stop(record, self._registry)

    def _follow(self, running: Running) -> None:
        async def keep() -> None:
            async for report in running.reports():
                kind = msgspec.json.decode(report)
                if kind.get("schema", "").startswith("outboard.migration.summary"):
                    self._history.keep(msgspec.json.decode(report, type=Summary))
                    log.info("migration ends", migration=running.migration, state=kind["state"], error=kind["error"])
            # An engine that was killed has left its hold on.
            self._let_go(running.vm)

        task = asyncio.create_task(keep())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _let_go(self, vm: str) -> None:
        """Hold nothing back in a VM that no migration holds."""
        with contextlib.suppress(OutboardError):
            left = release_left_over(self._registry.get(vm).pid)
            if left:
                log.warning("let go of held vCPUs", vm=vm, vcpus=left)

    def _receive(self, channel: Channel) -> None:
        """Answer one call on the peer port; in a thread of its own."""
        with contextlib.closing(channel):
            try:
                match messages.decode(channel.receive(_PREPARE_S).payload):
                    case messages.Prepare() as prepare:
                        answer: messages.Message = self._prepare(prepare, channel.peer_name)
                    case messages.Recover(migration):
                        answer = self._recover(migration, channel.peer_name)
                    case other:
                        raise PeerError(f"a call that begins with {type(other).__name__}")
                channel.send_message(messages.encode(answer))
            except OutboardError as error:
                log.warning("refused a peer", peer=channel.peer_name, why=str(error))
                with contextlib.suppress(OutboardError, OSError):
                    channel.send_message(messages.encode(messages.Failed(why=str(error), exit_code=error.exit_code)))

    def _prepare(self, prepare: messages.Prepare, source: str) -> messages.Prepared:
        if source not in self._config.hosts:
            raise NotAuthorisedError(
                f"{self._config.name} takes no VM from {source}: its agent.toml does not name it under [hosts]"
            )
        self._verdicts.expect(prepare.migration, source, prepare.vm)
        log.info("a VM is coming", migration=prepare.migration, vm=prepare.vm, source=source)
        task = Receive(
            source=source,
            listen=self._config.listen,
            ports=self._config.migration_ports,
            prepare=prepare,
            verdicts=os.fspath(self._verdicts.directory),
        )
        pipe = self._start_engine(task)
        if not pipe.poll(_PREPARE_S):
            pipe.close()
            raise UnreachableError(f"no engine was ready for {prepare.vm} in {_PREPARE_S:.0f} s")
        answer: Ready | Refused = msgspec.json.decode(pipe.recv_bytes(), type=Ready | Refused)
        if isinstance(answer, Refused):
            pipe.close()
            raise error_of(answer.exit_code, answer.why)
        threading.Thread(target=self._attend_receiving, args=(task, pipe), daemon=True).start()
        return messages.Prepared(port=answer.port, tokens=answer.tokens)

    def _recover(self, migration: str, source: str) -> messages.Message:
        """The source has lost touch with the engine: where it may call again, or that there is nobody to call.

        :raise NotAuthorisedError: that migration is not this source's.
        :raise UnreachableError: the engine is not ready yet.
        :raise NeedsRecoveryError: the VM came here, and has ended.
        """
        vm = self._verdicts.coming(migration, source)
        if (arrived := self._verdicts.arrived(migration)) is not None:
            return messages.decode(arrived)
        if self._verdicts.refuse(migration):
            log.warning("swore a migration off", migration=migration, vm=vm, source=source)
            return messages.Refused()
        try:
            record = self._registry.get(vm)
        except NotFoundError as error:
            raise NeedsRecoveryError(f"{vm} came to {self._config.name}, and has ended there") from error
        if not record.alive:
            raise NeedsRecoveryError(f"{vm} came to {self._config.name}, and its QEMU has ended there")
        try:
            told = (record.directory / REOPENED).read_bytes()
        except FileNotFoundError as error:
            raise UnreachableError(
                f"the engine of {vm} at {self._config.name} is not ready for another call"
            ) from error
        log.info("the source calls again", migration=migration, vm=vm, source=source)
        return messages.expect(told, messages.Prepared)

    def _succeed_receiving(self, task: Receive) -> None:
        """The engine of a VM that comes has died: another goes on if the VM is ours, else its QEMU ends."""
        prepare = task.prepare
        ours = not self._verdicts.refuse(prepare.migration)
        while True:
            try:
                record = self._registry.get(prepare.vm)
            except NotFoundError:
                return
            if not ours:
                log.warning("a VM whose engine died before the commit is given up", vm=prepare.vm)
                stop(record, self._registry)
                return
            if not record.alive or left_task(record.directory / ARRIVING, Receive) is None:
                return
            log.warning("an engine died, another takes over", migration=prepare.migration, vm=prepare.vm)
            if self._has_ended(task, self._start_engine(msgspec.structs.replace(task, again=True))):
                return
            time.sleep(_AGAIN_S)

    def _attend_receiving(self, task: Receive, pipe: Connection) -> None:
        """Hear how an incoming migration ends; in a thread of its own."""
        if not self._has_ended(task, pipe):
            self._succeed_receiving(task)

    def _has_ended(self, task: Receive, pipe: Connection) -> bool:
        """Wait until the engine ends; False: it died."""
        prepare = task.prepare
        with contextlib.closing(pipe):
            try:
                report: Ended | Refused = msgspec.json.decode(pipe.recv_bytes(), type=Ended | Refused)
            except (EOFError, OSError):
                log.error("an incoming engine died", migration=prepare.migration, vm=prepare.vm)
                return False
        log.info("an incoming migration ends", migration=prepare.migration, vm=prepare.vm, error=report.why)
        return True

    def _listen(self, listener: Listener) -> None:
        while True:
            try:
                channel = listener.accept(None)
            except OSError:
                return
            except OutboardError as error:
                log.warning("refused a caller", why=str(error))
                continue
            threading.Thread(target=self._receive, args=(channel,), daemon=True).start()

    async def _post(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=MigrateRequest)
        except msgspec.DecodeError as error:
            raise UsageError(f"POST /v1/migrations: {error}") from error
        running = self.depart(wanted)
        return JSONResponse({"migration": running.migration}, status_code=202)

    async def _get_reports(self, request: Request) -> Response:
        running = self._migrations.find(request.path_params["name"])

        async def lines() -> AsyncIterator[bytes]:
            async for report in running.reports():
                yield report + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def _ensure_engine(self, request: Request) -> Response:
        vm = request.path_params["vm"]
        if any(running.vm == vm for running in self._migrations.active()):
            raise RefusedError(
                "migrating", f"{vm} is being migrated: what is put away now would be missed at its other end"
            )
        self._engaging.append(vm)
        try:
            path = await asyncio.to_thread(self._supervisor.ensure, vm)
        finally:
            self._engaging.remove(vm)
        return JSONResponse({"control": os.fspath(path)})

    async def _upgrade_engine(self, request: Request) -> Response:
        engine = await asyncio.to_thread(self._supervisor.upgrade, request.path_params["vm"])
        return JSONResponse({"engine": engine})

    async def _patch(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=LimitRequest)
        except msgspec.DecodeError as error:
            raise UsageError(f"PATCH /v1/migrations: {error}") from error
        self._migrations.limit(request.path_params["name"], wanted.max_bandwidth)
        return JSONResponse({})

    async def _cancel(self, request: Request) -> Response:
        self._migrations.cancel(request.path_params["name"])
        return JSONResponse({}, status_code=202)

    async def _get_migrations(self, _: Request) -> Response:
        return JSONResponse([{"migration": one.migration, "vm": one.vm} for one in self._migrations.active()])

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/migrations", self._get_migrations, methods=["GET"]),
                Route("/v1/migrations", self._post, methods=["POST"]),
                Route("/v1/migrations/{name}", self._patch, methods=["PATCH"]),
                Route("/v1/migrations/{name}/reports", self._get_reports, methods=["GET"]),
                Route("/v1/migrations/{name}/cancel", self._cancel, methods=["POST"]),
                Route("/v1/engines/{vm}", self._ensure_engine, methods=["PUT"]),
                Route("/v1/engines/{vm}/upgrade", self._upgrade_engine, methods=["POST"]),
            ],
            exception_handlers={OutboardError: _explain},
        )

    async def _accompany(self, server: uvicorn.Server) -> None:
        self._adopt()
        await service.accompanied(server)

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Migrations go on: an engine does not need its agent.

        :raise RefusedError: ``agent-running``: another agent answers on this host's socket.
        """
        path = socket_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        _claim(path)
        # Whoever asks for a migration waits for us.
        sched.favour_this_process()
        # The first engine starts the server that the others are forked from; let that be now.
        warm = self._engines.Process(target=_nothing)
        warm.start()
        warm.join()
        self._supervisor.adopt()
        for record in self._registry.list():
            self._let_go(record.name)
        listener = Listener(self._config.listen, (self._config.port, self._config.port), self._identity)
        threading.Thread(target=self._listen, args=(listener,), daemon=True, name="peer-port").start()
        log.info("agent is up", name=self._config.name, listen=self._config.listen, port=self._config.port)
        server = uvicorn.Server(uvicorn.Config(self._app(), uds=os.fspath(path), log_level="warning", lifespan="off"))
        try:
            # uvicorn ends in order and then raises the signal again, which would end us before we are done.
            signal.signal(signal.SIGTERM, lambda *_: None)
            asyncio.run(self._accompany(server))
        finally:
            listener.close()
            path.unlink(missing_ok=True)


def _nothing() -> None:
    """The first engine's work."""


def _claim(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise RefusedError("agent-running", f"an agent already answers on {path}; stop it first")


async def _explain(_: Request, error: Exception) -> Response:
    status = {2: 400, 3: 404, 4: 409, 7: 403, 8: 503}.get(getattr(error, "exit_code", 1), 500)
    return JSONResponse({"error": str(error), "exit_code": getattr(error, "exit_code", 1)}, status_code=status)
