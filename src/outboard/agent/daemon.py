"""The agent: one process a host, which starts engines and answers for them.

It listens twice. Other hosts reach it over mutual TLS on the peer port, where the one thing they can ask is to prepare
for a migration. The people of this host reach it over HTTP on a unix socket (``agent.sock``, mode 0660).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from outboard.agent import service
from outboard.agent.arrivals import Arrivals
from outboard.agent.config import AgentConfig, socket_path, state_dir
from outboard.agent.departures import Departures
from outboard.agent.engine import ARRIVING, DEPARTING
from outboard.agent.engines import Engines
from outboard.agent.history import History
from outboard.agent.pressure import Pressure
from outboard.agent.promises import pools_of
from outboard.agent.sharing_domains import SharingDomains
from outboard.agent.supervisor import Supervisor
from outboard.agent.verdicts import Verdicts
from outboard.errors import (
    OutboardError,
    RefusedError,
    UsageError,
)
from outboard.linux import sched
from outboard.migrate.desk import Limit
from outboard.migrate.goals import options_for
from outboard.migrate.method import Goal, Options
from outboard.sharing.inside import Thresholds
from outboard.vmm.registry import Registry, VmRecord
from outboard.wire.tls import Listener

log = structlog.get_logger()


class MigrateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/migrations and /v1/plans: ``options`` are those that were said, named as in Options."""

    vm: str
    host: str
    goal: Goal | None = None
    options: dict[str, Any] = {}

    def settled(self) -> Options:
        """All options; errors as :func:`~outboard.migrate.goals.options_for`."""
        return options_for(self.goal, self.options)


class RestoreRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/restores."""

    vm: str
    snapshot: str
    eager: bool = False


class ShareRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of PUT /v1/sharing/DOMAIN; seconds between two scans, and between two looks at reads."""

    every_s: float = 10.0
    reads_s: float = 1.0
    large: Thresholds = Thresholds()


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
        self._engines = Engines(registry, identity)
        self._supervisor = Supervisor(self._engines.start, registry, state_dir() / "swap", config)
        self._sharing = SharingDomains(self._engines.start, self._supervisor.ensure, registry, config.sharing)
        self._engaging: list[str] = []
        self._departures = Departures(
            config, registry, self._engines, History(state_dir() / "history.db"), self._is_managed
        )
        self._arrivals = Arrivals(config, registry, self._engines, Verdicts(state_dir() / "incoming"))

    def _is_managed(self, record: VmRecord) -> bool:
        return record.memory_directory.exists() or record.name in self._engaging

    def _adopt(self) -> None:
        """Find the migrations whose engines died while no agent was there."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._arrivals.adopt_unrecorded, daemon=True).start()
        for record in self._registry.list():
            if (record.directory / DEPARTING).exists():
                threading.Thread(target=self._departures.adopt, args=(record, loop), daemon=True).start()
            if (record.directory / ARRIVING).exists():
                threading.Thread(target=self._arrivals.adopt, args=(record,), daemon=True).start()

    def _reserve(self) -> None:
        try:
            self._supervisor.reserve()
            swap, pools = self._config.swap, pools_of(self._config)
            if swap is not None and pools is not None and swap.pressure:
                moving = self._departures.is_migrating
                Pressure(pools, self._registry, self._supervisor.ensure, moving).start(swap.stall_ms)
        except OutboardError as error:
            # VMs run without it; none is managed, but those that are already.
            log.error("no swap is reserved", why=str(error))

    async def _plan(self, request: Request) -> Response:
        wanted = await _wanted(request)
        plan = await self._departures.plan(wanted.vm, wanted.host, wanted.settled())
        return Response(msgspec.json.encode(plan), media_type="application/json")

    async def _post(self, request: Request) -> Response:
        wanted = await _wanted(request)
        running = self._departures.depart(wanted.vm, wanted.host, wanted.settled())
        return JSONResponse({"migration": running.migration}, status_code=202)

    async def _get_reports(self, request: Request) -> Response:
        running = self._departures.running.find(request.path_params["name"])

        async def lines() -> AsyncIterator[bytes]:
            async for report in running.reports():
                yield report + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def _ensure_engine(self, request: Request) -> Response:
        vm = request.path_params["vm"]
        if self._departures.is_migrating(vm):
            raise RefusedError(
                "migrating", f"{vm} is being migrated: what is put away now would be missed at its other end"
            )
        self._engaging.append(vm)
        try:
            path = await asyncio.to_thread(self._supervisor.ensure, vm)
        finally:
            self._engaging.remove(vm)
        return JSONResponse({"control": os.fspath(path)})

    async def _restore(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=RestoreRequest)
        except msgspec.DecodeError as error:
            raise UsageError(f"POST /v1/restores: {error}") from error
        self._engaging.append(wanted.vm)
        try:
            engine = await asyncio.to_thread(self._supervisor.restore, wanted.vm, wanted.snapshot, eager=wanted.eager)
        finally:
            self._engaging.remove(wanted.vm)
        return JSONResponse({"vm": wanted.vm, "engine": engine})

    async def _upgrade_engine(self, request: Request) -> Response:
        engine = await asyncio.to_thread(self._supervisor.upgrade, request.path_params["vm"])
        return JSONResponse({"engine": engine})

    async def _share(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=ShareRequest)
        except msgspec.DecodeError as error:
            raise UsageError(f"PUT /v1/sharing: {error}") from error
        name = request.path_params["domain"]
        vms = self._config.sharing.get(name, [name])
        for vm in vms:
            if self._departures.is_migrating(vm):
                raise RefusedError("migrating", f"{vm} is being migrated; share its pages when it has arrived")
        self._engaging += vms
        try:
            process = await asyncio.to_thread(self._sharing.begin, name, wanted.every_s, wanted.reads_s, wanted.large)
        finally:
            for vm in vms:
                self._engaging.remove(vm)
        return JSONResponse({"process": process})

    async def _patch(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body(), type=Limit)
        except msgspec.DecodeError as error:
            raise UsageError(f"PATCH /v1/migrations: {error}") from error
        self._departures.running.limit(request.path_params["name"], wanted)
        return JSONResponse({})

    async def _cancel(self, request: Request) -> Response:
        self._departures.running.cancel(request.path_params["name"])
        return JSONResponse({}, status_code=202)

    async def _switch(self, request: Request) -> Response:
        self._departures.running.switch(request.path_params["name"])
        return JSONResponse({}, status_code=202)

    async def _get_migrations(self, _: Request) -> Response:
        return JSONResponse([{"migration": one.migration, "vm": one.vm} for one in self._departures.running.active()])

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/migrations", self._get_migrations, methods=["GET"]),
                Route("/v1/migrations", self._post, methods=["POST"]),
                Route("/v1/plans", self._plan, methods=["POST"]),
                Route("/v1/migrations/{name}", self._patch, methods=["PATCH"]),
                Route("/v1/migrations/{name}/reports", self._get_reports, methods=["GET"]),
                Route("/v1/migrations/{name}/cancel", self._cancel, methods=["POST"]),
                Route("/v1/migrations/{name}/switch", self._switch, methods=["POST"]),
                Route("/v1/restores", self._restore, methods=["POST"]),
                Route("/v1/engines/{vm}", self._ensure_engine, methods=["PUT"]),
                Route("/v1/sharing/{domain}", self._share, methods=["PUT"]),
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
        self._engines.warm()
        self._reserve()
        self._supervisor.adopt()
        self._sharing.adopt()
        for record in self._registry.list():
            self._departures.let_go(record.name)
        listener = Listener(self._config.listen, (self._config.port, self._config.port), self._identity)
        threading.Thread(target=self._arrivals.listen, args=(listener,), daemon=True, name="peer-port").start()
        log.info("agent is up", name=self._config.name, listen=self._config.listen, port=self._config.port)
        server = uvicorn.Server(uvicorn.Config(self._app(), uds=os.fspath(path), log_level="warning", lifespan="off"))
        try:
            # uvicorn ends in order and then raises the signal again, which would end us before we are done.
            signal.signal(signal.SIGTERM, lambda *_: None)
            asyncio.run(self._accompany(server))
        finally:
            listener.close()
            path.unlink(missing_ok=True)


async def _wanted(request: Request) -> MigrateRequest:
    try:
        return msgspec.json.decode(await request.body(), type=MigrateRequest)
    except msgspec.DecodeError as error:
        raise UsageError(f"POST {request.url.path}: {error}") from error


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
