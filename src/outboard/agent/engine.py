"""Engines: the processes that manage one guest each, started by the agent.

An engine is forked from a server process that has everything imported, so that it is there within milliseconds. It
speaks to its agent over a pipe; when the agent is gone it goes on with what it does, since a migration that has
switched over has no way back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from outboard.agent.manager import Manager
from outboard.agent.verdicts import Verdicts
from outboard.errors import OutboardError, UnreachableError
from outboard.linux import prctl, sched
from outboard.migrate import messages
from outboard.migrate.admission import Admission
from outboard.migrate.desk import Destination, Order
from outboard.migrate.destination import Incoming
from outboard.migrate.messages import Prepare
from outboard.migrate.method import Options
from outboard.migrate.report import Progress, Summary
from outboard.migrate.source import Outgoing
from outboard.migrate.states import State
from outboard.migrate.summary import summarise
from outboard.vmm.attach import attach
from outboard.vmm.launch import launch, stop
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_spec
from outboard.wire.channel import Channel
from outboard.wire.tls import Listener
from outboard.wire.token import TokenBook

REOPENED = "reopened.json"
"""In the directory of a VM that has come and whose streams broke off: a Prepared, for the source to call again."""


class Depart(msgspec.Struct, frozen=True, tag="depart"):
    """Migrate a VM of this host (``source``) away; ``began`` is when the agent was told to, CLOCK_MONOTONIC."""

    migration: str
    vm: str
    source: str
    destination: Destination
    options: Options
    began: float
    throttle_gain: float


class Receive(msgspec.Struct, frozen=True, tag="receive"):
    """Take in a VM from ``source``."""

    source: str
    listen: str
    ports: tuple[int, int]
    prepare: Prepare
    verdicts: str


class Manage(msgspec.Struct, frozen=True, tag="manage"):
    """Manage the memory of a VM of this host; ``successor``: take it over from the engine that does."""

    vm: str
    swap: str
    successor: bool


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """An engine that could not even begin, and why."""

    why: str
    exit_code: int


class Managing(msgspec.Struct, frozen=True, tag="managing"):
    """A managing engine serves."""

    engine: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """An incoming engine listens."""

    port: int
    tokens: dict[str, str]


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """An incoming engine has ended; None when all went well."""

    why: str | None


class PipeDesk:
    """The migration's desk at the engine's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._gone = False

    def fileno(self) -> int:
        return -1 if self._gone else self._pipe.fileno()

    def close(self) -> None:
        """Nothing more is to be heard or told."""
        self._pipe.close()
        self._gone = True

    def order(self) -> Order | None:
        try:
            order: Order = msgspec.json.decode(self._pipe.recv_bytes(), type=Order)
        except (EOFError, OSError):
            self._gone = True
            return None
        return order

    def report(self, report: Progress | Summary | Ready | Managing | Refused | Ended) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send_bytes(msgspec.json.encode(report))


def run_engine(task: bytes, pipe: Connection, runtime: str, identity: str) -> None:
    """Be an engine; the entry point of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl.set_name("outboard-engine")
    # It sleeps nearly always, and what it does while a guest is paused is that guest's blackout.
    sched.favour_this_process()
    desk = PipeDesk(pipe)
    work: Depart | Receive | Manage = msgspec.json.decode(task, type=Depart | Receive | Manage)
    try:
        match work:
            case Depart():
                desk.report(_depart(work, desk, Registry(Path(runtime)), Path(identity)))
            case Receive():
                _receive(work, desk, Registry(Path(runtime)), Path(identity))
            case Manage():
                _manage(work, desk, Registry(Path(runtime)))
    except OutboardError as error:
        desk.report(Refused(why=str(error), exit_code=error.exit_code))
        sys.exit(1)


def _depart(work: Depart, desk: PipeDesk, registry: Registry, identity: Path) -> Summary:
    """Migrate; every way it can end is a summary."""
    record = registry.get(work.vm)
    attaching = time.monotonic()
    with record.attach() as guest:
        attach_ms = (time.monotonic() - attaching) * 1e3
        outgoing = Outgoing(
            work.migration,
            guest,
            work.destination,
            work.options,
            spec=record.spec_text(),
            directory=record.directory,
            identity=identity,
            desk=desk,
            began=work.began,
            throttle_gain=work.throttle_gain,
        )
        error: OutboardError | None = None
        try:
            outgoing.run()
        except OutboardError as failure:
            error = failure
    if outgoing.machine.state is State.COMPLETED:
        registry.remove(work.vm)
    return summarise(outgoing, source=work.source, attach_ms=attach_ms, error=error)


def _manage(work: Manage, desk: PipeDesk, registry: Registry) -> None:
    """Manage the VM's memory for as long as it runs; the agent is told once, and not needed afterwards."""
    record = registry.get(work.vm)
    manager = Manager(record.memory_directory, record.attach, Path(work.swap), successor=work.successor)
    desk.report(Managing(engine=os.getpid()))
    desk.close()
    manager.serve()


def _receive(work: Receive, desk: PipeDesk, registry: Registry, identity: Path) -> None:
    """Take the VM in with a QEMU of its own, and end that QEMU if the VM stays where it was."""
    tokens = TokenBook(time.monotonic)
    listener = Listener(work.listen, work.ports, identity)
    with contextlib.ExitStack() as until_end, Admission(work.prepare, work.source, listener, tokens) as admission:
        desk.report(Ready(port=listener.port, tokens={role: tokens.issue(role) for role in messages.ROLES}))
        try:
            incoming = _bring_up(work, registry, until_end, identity)
        except OutboardError as error:
            admission.refuse(error)
            raise
        streams = admission.streams()
        listener.close()
        incoming.run(streams)
    desk.report(Ended(why=None))


def _reopen(work: Receive, directory: Path, identity: Path) -> dict[str, Channel]:
    """Wait until the source calls again, and let its streams in.

    Where to call, and with which tokens, lies in the VM's directory for the agent to tell.
    """
    place, draft = directory / REOPENED, directory / f"{REOPENED}.new"
    tokens = TokenBook(time.monotonic)
    with (
        Listener(work.listen, work.ports, identity) as listener,
        Admission(work.prepare, work.source, listener, tokens) as admission,
    ):
        while True:
            issued = {role: tokens.issue(role) for role in messages.ROLES}
            draft.touch(mode=0o600)
            draft.write_bytes(messages.encode(messages.Prepared(port=listener.port, tokens=issued)))
            draft.rename(place)
            try:
                return admission.streams()
            except UnreachableError:
                # Tokens do not live for ever.
                continue
            finally:
                place.unlink(missing_ok=True)


def _bring_up(work: Receive, registry: Registry, until_end: contextlib.ExitStack, identity: Path) -> Incoming:
    """Start the QEMU and clamp on to it; ``until_end`` lets go of it, and ends it unless the VM has become ours."""
    prepare = work.prepare
    record = launch(parse_spec(prepare.spec, f"the spec of {prepare.vm}"), registry, incoming=True)
    incoming: Incoming | None = None

    def end() -> None:
        if incoming is None or not incoming.committed:
            stop(record, registry)

    until_end.callback(end)
    guest = attach(qmp=record.engine_socket, name=prepare.vm, agent_path=record.agent_socket)
    until_end.enter_context(guest)
    verdicts = Verdicts(Path(work.verdicts))
    incoming = Incoming(
        prepare,
        guest,
        source=work.source,
        directory=record.directory,
        commit=lambda: verdicts.commit(prepare.migration),
        note_arrived=lambda message: verdicts.note_arrived(prepare.migration, message),
        reopen=lambda: _reopen(work, record.directory, identity),
    )
    return incoming
