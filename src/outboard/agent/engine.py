"""Engines: the processes that manage one guest each, started by the agent.

An engine is forked from a server process that has everything imported, so that it is there within milliseconds. It
speaks to its agent over a pipe; when the agent is gone it goes on with what it does, since a migration that has
switched over has no way back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from outboard.agent import domains, planning
from outboard.agent.config import snapshot_dir, state_dir
from outboard.agent.domains import Sharing
from outboard.agent.history import History
from outboard.agent.manager import Manager
from outboard.agent.planning import Planning
from outboard.agent.promises import admitted
from outboard.agent.snapshotting import Vm
from outboard.agent.succession import keep_task, left_task, only_one
from outboard.agent.tasks import Depart, Ended, Manage, Managing, Ready, Receive, Refused, Restore, Task
from outboard.agent.verdicts import Verdicts
from outboard.errors import NeedsRecoveryError, OutboardError, RefusedError, UnreachableError
from outboard.linux import pidfd, prctl, sched
from outboard.migrate import messages
from outboard.migrate.admission import Admission
from outboard.migrate.desk import Order
from outboard.migrate.destination import Incoming, check_layout
from outboard.migrate.plan import Plan
from outboard.migrate.report import Progress, Summary
from outboard.migrate.source import Outgoing
from outboard.migrate.states import State
from outboard.migrate.summary import summarise
from outboard.pager.arriving import ArrivingMemory
from outboard.pager.arriving_large import arriving_kind
from outboard.pager.rebuilding import Rebuilding
from outboard.stores.images.images import Images
from outboard.stores.snapshot import SnapshotStore
from outboard.vmm.attach import attach
from outboard.vmm.device_state import Arrival, runs
from outboard.vmm.disks import cloned, remove_clones
from outboard.vmm.guest import Guest
from outboard.vmm.launch import launch, stop
from outboard.vmm.layout import Layout
from outboard.vmm.monitor import Monitor
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import parse_spec
from outboard.wire.channel import Channel
from outboard.wire.tls import Listener
from outboard.wire.token import TokenBook

REOPENED = "reopened.json"
"""In the directory of a VM that has come and whose streams broke off: a Prepared, for the source to call again."""
INDEXES = "blocks"
"""In the state directory: what the disk images of VMs hold."""
ARRIVING, DEPARTING = "arriving", "departing"
"""Directories in that of a VM on its way: what a successor of the engine must know."""
PAUSED = "paused"
"""A file in DEPARTING: the guest was paused when it was sent away, and is to stay so."""
_LAYOUT = "layout.json"
_ANSWER_S = 2.0
_LOAD_S = 30.0


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

    def report(self, report: Progress | Summary | Plan | Ready | Managing | Refused | Ended) -> None:
        self.tell(report)

    def tell(self, report: Progress | Summary | Plan | Ready | Managing | Refused | Ended) -> bool:
        """Report; whether there was an agent to hear it."""
        try:
            self._pipe.send_bytes(msgspec.json.encode(report))
        except OSError:
            return False
        return True


def run_engine(task: bytes, pipe: Connection, runtime: str, identity: str) -> None:
    """Be an engine; the entry point of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl.set_name("outboard-engine")
    # It sleeps nearly always, and what it does while a guest is paused is that guest's blackout.
    sched.favour_this_process()
    desk = PipeDesk(pipe)
    work: Task = msgspec.json.decode(task, type=Task)
    try:
        match work:
            case Depart():
                summary = _depart(work, desk, Registry(Path(runtime)), Path(identity))
                if not desk.tell(summary):
                    # The agent that would have kept it is gone.
                    History(state_dir() / "history.db").keep(summary)
            case Receive():
                _receive(work, desk, Registry(Path(runtime)), Path(identity))
            case Planning():
                random = np.random.default_rng()
                record = Registry(Path(runtime)).get(work.vm)
                desk.report(planning.make(work, record, Path(identity), state_dir() / INDEXES, random))
            case Sharing():
                domains.run(work, Registry(Path(runtime)), lambda: _ready(desk))
            case Manage():
                _manage(work, desk, Registry(Path(runtime)))
            case Restore():
                _restore(work, desk, Registry(Path(runtime)))
    except OutboardError as error:
        desk.report(Refused(why=str(error), exit_code=error.exit_code))
        sys.exit(1)


def _leave_no_empty(journal: Path) -> None:
    """Before the commit there is nothing for a successor to do."""
    if left_task(journal, Depart) is None:
        shutil.rmtree(journal, ignore_errors=True)


def _depart(work: Depart, desk: PipeDesk, registry: Registry, identity: Path) -> Summary:
    """Migrate; every way it can end is a summary."""
    record = registry.get(work.vm)
    journal = record.directory / DEPARTING
    journal.mkdir(mode=0o700, exist_ok=True)
    attaching = time.monotonic()
    with contextlib.ExitStack() as until_end:
        until_end.callback(os.close, only_one(journal))
        until_end.callback(_leave_no_empty, journal)
        guest = until_end.enter_context(record.attach())
        if not work.again:
            if runs(guest.monitor, guest.name):
                (journal / PAUSED).unlink(missing_ok=True)
            else:
                (journal / PAUSED).touch()
        attach_ms = (time.monotonic() - attaching) * 1e3
        outgoing = Outgoing(
            work.migration,
            guest,
            work.destination,
            work.options,
            spec=record.spec_text(),
            directory=journal,
            identity=identity,
            indexes=state_dir() / INDEXES,
            desk=desk,
            began=work.began,
            throttle_gain=work.throttle_gain,
            running=not (journal / PAUSED).exists(),
            before_commit=lambda: keep_task(journal, work),
            # While the lock is held: an agent that waits for it would take what is left for work to be done.
            free=lambda: registry.remove(work.vm),
        )
        error: OutboardError | None = None
        try:
            if work.again:
                outgoing.take_over()
            else:
                outgoing.run()
        except OutboardError as failure:
            error = failure
        # With the lock held, as above.
        if outgoing.machine.state not in (State.COMPLETED, State.PAUSED):
            shutil.rmtree(journal, ignore_errors=True)
    return summarise(outgoing, source=work.source, attach_ms=attach_ms, error=error)


def _manage(work: Manage, desk: PipeDesk, registry: Registry) -> None:
    """Manage the VM's memory for as long as it runs; the agent is told once, and not needed afterwards."""
    record = registry.get(work.vm)
    disks = parse_spec(record.spec_text(), f"the spec of {work.vm}").disks
    try:
        manager = Manager(
            record.memory_directory,
            record.attach,
            work.swap,
            disks,
            state_dir() / INDEXES,
            successor=work.successor,
            vm=Vm(work.vm, registry, snapshot_dir()),
        )
    except RefusedError as error:
        if error.reason == "restore-broken":
            end_broken(record, registry)
        raise
    _ready(desk)
    manager.serve()


def end_broken(record: VmRecord, registry: Registry) -> None:
    """End a VM whose restoration was broken off: it has never run."""
    spec = parse_spec(record.spec_text(), f"the description of {record.name}")
    stop(record, registry)
    remove_clones(spec)


def _restore(work: Restore, desk: PipeDesk, registry: Registry) -> None:
    """Start a QEMU that waits, give it the devices' state and no memory, and manage it from then on."""
    directory = snapshot_dir()
    # The index of a large VM takes as long to read as QEMU to start.
    reader = ThreadPoolExecutor(1)
    opening = reader.submit(SnapshotStore, directory, work.snapshot)
    reader.shutdown(wait=False)
    spec = parse_spec(work.spec, f"the description of {work.snapshot}")
    spec = cloned(msgspec.structs.replace(spec, name=work.vm))
    record: VmRecord | None = None
    try:
        with admitted(spec, registry):
            record = launch(spec, registry, incoming=True)
        store = opening.result()
        contents = store.chain[0]
        manager = Manager(
            record.memory_directory,
            record.attach,
            work.swap,
            spec.disks,
            state_dir() / INDEXES,
            vm=Vm(work.vm, registry, directory),
            restore=store,
        )
        with (
            honest_about(record),
            Vm(work.vm, registry, directory).attach() as guest,
            contextlib.closing(Arrival(guest, record.directory)) as arrival,
        ):
            arrival.feed(memoryview(contents.devices))
            arrival.finish(_LOAD_S)
            if work.eager:
                manager.bring_all()
            if contents.meta.running:
                arrival.resume(_LOAD_S)
            manager.begun()
            arrival.announce()
    except BaseException:
        if record is not None:
            stop(record, registry)
        remove_clones(spec)
        raise
    _ready(desk)
    manager.serve()


def _ready(desk: PipeDesk) -> None:
    desk.report(Managing(engine=os.getpid()))
    desk.close()


def _receive(work: Receive, desk: PipeDesk, registry: Registry, identity: Path) -> None:
    """Take the VM in, and end its QEMU if it stays where it was."""
    if work.again:
        _receive_again(work, registry, identity)
    else:
        _receive_first(work, desk, registry, identity)
    desk.report(Ended(why=None))


def _receive_first(work: Receive, desk: PipeDesk, registry: Registry, identity: Path) -> None:
    tokens = TokenBook(time.monotonic)
    listener = Listener(work.listen, work.ports, identity)
    with contextlib.ExitStack() as until_end, Admission(work.prepare, work.source, listener, tokens) as admission:
        desk.report(Ready(port=listener.port, tokens=admission.issue()))
        try:
            incoming = _bring_up(work, registry, until_end, identity)
        except OutboardError as error:
            admission.refuse(error)
            raise
        streams = admission.streams()
        listener.close()
        incoming.run(streams)
        # While the lock is held: an agent that waits for it would take what is left for work to be done.
        shutil.rmtree(registry.get(work.prepare.vm).directory / ARRIVING)


def _receive_again(work: Receive, registry: Registry, identity: Path) -> None:
    """Go on in the place of an engine that died when the VM was here already."""
    record = registry.get(work.prepare.vm)
    journal = record.directory / ARRIVING
    with contextlib.ExitStack() as until_end:
        until_end.callback(os.close, only_one(journal))
        layout = Layout.load(journal / _LAYOUT)
        if layout is None:
            raise NeedsRecoveryError(f"QEMU of {work.prepare.vm} has ended")
        guest = until_end.enter_context(layout.guest())
        memory = arriving_kind(guest).take_again(guest, journal)
        incoming = _incoming(work, record, guest, memory, None, identity)
        if work.prepare.running:
            _see_that_it_runs(record)
        incoming.run(None)
        if work.prepare.running:
            # It may have waited for a page when we looked.
            _see_that_it_runs(record)
        shutil.rmtree(journal)


def _see_that_it_runs(record: VmRecord) -> None:
    """The engine before may have died before it let the VM run. One that waits for a page runs, and answers nothing."""
    with contextlib.suppress(UnreachableError), Monitor.connect(record.engine_socket, timeout=_ANSWER_S) as monitor:
        if not monitor.execute("query-status")["running"]:
            monitor.execute("cont")


def _incoming(
    work: Receive,
    record: VmRecord,
    guest: Guest,
    memory: ArrivingMemory,
    arrival: Arrival | None,
    identity: Path,
    images: Images | None = None,
) -> Incoming:
    verdicts = Verdicts(Path(work.verdicts))
    return Incoming(
        guest,
        memory,
        arrival,
        Rebuilding(memory, record.directory / ARRIVING),
        source=work.source,
        running=work.prepare.running,
        commit=lambda: verdicts.commit(work.prepare.migration),
        note_arrived=lambda message: verdicts.note_arrived(work.prepare.migration, message),
        images=images,
        reopen=lambda: _reopen(work, record.directory, identity, guest),
    )


def _reopen(work: Receive, directory: Path, identity: Path, guest: Guest) -> dict[str, Channel]:
    """Wait until the source calls again, and let its streams in.

    Where to call, and with which tokens, lies in the VM's directory for the agent to tell.

    :raise OutboardError: its QEMU has ended meanwhile.
    """

    def look() -> None:
        if not pidfd.alive(guest.pid):
            raise OutboardError(f"QEMU of {guest.name}, process {guest.pid}, has ended at the destination")

    place, draft = directory / REOPENED, directory / f"{REOPENED}.new"
    tokens = TokenBook(time.monotonic)
    with (
        Listener(work.listen, work.ports, identity) as listener,
        Admission(work.prepare, work.source, listener, tokens) as admission,
    ):
        while True:
            draft.touch(mode=0o600)
            draft.write_bytes(messages.encode(messages.Prepared(port=listener.port, tokens=admission.issue())))
            draft.rename(place)
            try:
                return admission.streams(look)
            except UnreachableError:
                # Tokens do not live for ever.
                continue
            finally:
                place.unlink(missing_ok=True)


def _bring_up(work: Receive, registry: Registry, until_end: contextlib.ExitStack, identity: Path) -> Incoming:
    """Start the QEMU and clamp on to it; ``until_end`` lets go of it, and ends it unless the VM has become ours."""
    prepare = work.prepare
    spec = parse_spec(prepare.spec, f"the spec of {prepare.vm}")
    with admitted(spec, registry):
        record = launch(spec, registry, incoming=True)
    incoming: Incoming | None = None

    def end() -> None:
        if incoming is None or not incoming.committed:
            stop(record, registry)

    until_end.callback(end)
    with honest_about(record):
        incoming = _clamp_on(work, record, until_end, identity)
    return incoming


@contextlib.contextmanager
def honest_about(record: VmRecord) -> Iterator[None]:
    """A QEMU that does not answer because it has ended is said to have ended."""
    try:
        yield
    except UnreachableError as error:
        process = pidfd.open(record.pid)
        try:
            # Its sockets close a moment before it has ended.
            if pidfd.wait(process, 1.0):
                raise OutboardError(
                    f"QEMU of {record.name}, process {record.pid}, has ended at the destination"
                ) from error
        finally:
            pidfd.close(process)
        raise


def _clamp_on(work: Receive, record: VmRecord, until_end: contextlib.ExitStack, identity: Path) -> Incoming:
    prepare = work.prepare
    journal = record.directory / ARRIVING
    journal.mkdir(mode=0o700)
    until_end.callback(os.close, only_one(journal))
    guest = attach(qmp=record.engine_socket, name=prepare.vm, agent_path=record.agent_socket)
    until_end.enter_context(guest)
    check_layout(guest, prepare)
    Layout.keep(guest, journal / _LAYOUT)
    keep_task(journal, work)
    memory = arriving_kind(guest)(guest, journal)
    arrival = Arrival(guest, record.directory)
    until_end.callback(arrival.close)
    images = until_end.enter_context(Images(parse_spec(prepare.spec, f"the spec of {prepare.vm}").disks))
    return _incoming(work, record, guest, memory, arrival, identity, images)
