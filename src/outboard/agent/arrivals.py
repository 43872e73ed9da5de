"""VMs on their way to here: what other hosts' agents ask of this one, and what happens when an engine dies on one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from multiprocessing.connection import Connection

import msgspec
import structlog

from outboard.agent.config import AgentConfig
from outboard.agent.engine import ARRIVING, REOPENED
from outboard.agent.engines import Engines
from outboard.agent.readiness import blockers
from outboard.agent.succession import left_task, only_one
from outboard.agent.tasks import Ended, Ready, Receive, Refused
from outboard.agent.verdicts import Verdicts
from outboard.errors import (
    NeedsRecoveryError,
    NotAuthorisedError,
    NotFoundError,
    OutboardError,
    PeerError,
    RefusedError,
    UnreachableError,
    error_of,
)
from outboard.migrate import messages
from outboard.migrate.probe import BURSTS, take_burst
from outboard.vmm.device_state import awaits_state
from outboard.vmm.launch import end_unrecorded, stop
from outboard.vmm.registry import Registry, VmRecord
from outboard.wire.channel import Channel
from outboard.wire.tls import Listener

_PREPARE_S = 30.0
_AGAIN_S = 1.0
"""Between the death of an engine that took over and the next."""

_STARTING_S, _LOOK_S = 5.0, 0.05

log = structlog.get_logger()


class Arrivals:
    """The migrations that end here.

    Synchronization: threads of its own, one for each call and one for each VM that comes.
    """

    def __init__(self, config: AgentConfig, registry: Registry, engines: Engines, verdicts: Verdicts) -> None:
        self._config, self._registry, self._engines, self._verdicts = config, registry, engines, verdicts

    def listen(self, listener: Listener) -> None:
        """Answer calls on the peer port until the listener is closed."""
        while True:
            try:
                channel = listener.accept(None)
            except OSError:
                return
            except OutboardError as error:
                log.warning("refused a caller", why=str(error))
                continue
            threading.Thread(target=self._answer, args=(channel,), daemon=True).start()

    def _answer(self, channel: Channel) -> None:
        """Answer one call on the peer port; in a thread of its own."""
        with contextlib.closing(channel):
            try:
                match messages.decode(channel.receive(_PREPARE_S).payload):
                    case messages.Prepare() as prepare:
                        answer: messages.Message = self._prepare(prepare, channel.peer_name)
                    case messages.Probe() as probe:
                        answer = self._probe(probe, channel)
                    case messages.Recover(migration):
                        answer = self._recover(migration, channel.peer_name)
                    case other:
                        raise PeerError(f"a call that begins with {type(other).__name__}")
                channel.send_message(messages.encode(answer))
            except OutboardError as error:
                log.warning("refused a peer", peer=channel.peer_name, why=str(error))
                with contextlib.suppress(OutboardError, OSError):
                    channel.send_message(messages.encode(messages.Failed(why=str(error), exit_code=error.exit_code)))

    def _authorise(self, source: str) -> None:
        if source not in self._config.hosts:
            raise NotAuthorisedError(
                f"{self._config.name} takes no VM from {source}: its agent.toml does not name it under [hosts]"
            )

    def _probe(self, probe: messages.Probe, channel: Channel) -> messages.Carried:
        """Answer a probe; its last answer is left to the caller to send."""
        self._authorise(channel.peer_name)
        found = blockers(probe.spec, probe.qemu, self._registry, here=self._config.name)
        said = [messages.Hindrance(one.reason, one.words) for one in found]
        channel.send_message(messages.encode(messages.Probed(said)))
        for _ in range(BURSTS - 1):
            channel.send_message(messages.encode(take_burst(channel)))
        return take_burst(channel)

    def _prepare(self, prepare: messages.Prepare, source: str) -> messages.Prepared:
        self._authorise(source)
        self._verdicts.expect(prepare.migration, source, prepare.vm)
        log.info("a VM is coming", migration=prepare.migration, vm=prepare.vm, source=source)
        task = Receive(
            source=source,
            listen=self._config.listen,
            ports=self._config.migration_ports,
            prepare=prepare,
            verdicts=os.fspath(self._verdicts.directory),
        )
        pipe = self._engines.start(task)
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

    def succeed(self, task: Receive) -> None:
        """The engine of a VM that comes has died: another goes on if the VM is ours, else its QEMU ends."""
        prepare = task.prepare
        if self._verdicts.refuse(prepare.migration):
            log.warning("a VM whose engine died before the commit is given up", vm=prepare.vm)
            self._give_up(prepare)
            return
        while True:
            try:
                record = self._registry.get(prepare.vm)
            except NotFoundError:
                return
            if not record.alive or left_task(record.directory / ARRIVING, Receive) is None:
                return
            log.warning("an engine died, another takes over", migration=prepare.migration, vm=prepare.vm)
            if self._has_ended(task, self._engines.start(msgspec.structs.replace(task, again=True))):
                return
            time.sleep(_AGAIN_S)

    def _give_up(self, prepare: messages.Prepare) -> None:
        """End the QEMU that was to take the VM in, and no other of that name."""
        deadline = time.monotonic() + _STARTING_S
        while True:
            # Also one whose QEMU has ended, as it does when its stream of state breaks off.
            record = next((one for one in self._registry.list() if one.name == prepare.vm), None)
            if record is not None:
                coming = left_task(record.directory / ARRIVING, Receive)
                if awaits_state(record) if coming is None else coming.prepare.migration == prepare.migration:
                    stop(record, self._registry)
                return
            try:
                end_unrecorded(prepare.vm, self._registry)
                return
            except RefusedError:
                # The engine died as it forked, or somebody else starts a VM of that name.
                if time.monotonic() > deadline:
                    return
                time.sleep(_LOOK_S)

    def _attend_receiving(self, task: Receive, pipe: Connection) -> None:
        """Hear how an incoming migration ends; in a thread of its own."""
        if not self._has_ended(task, pipe):
            self.succeed(task)

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

    def adopt_unrecorded(self) -> None:
        """End what was started to take a VM in, by engines that died before they could say so."""
        for name in self._registry.unrecorded():
            # An engine that lives is still at it.
            with contextlib.suppress(RefusedError):
                if end_unrecorded(name, self._registry):
                    log.warning("ended a QEMU without a record", vm=name)

    def adopt(self, record: VmRecord) -> None:
        """Wait for the end of the engine that takes the VM in, if there is one, and see to what it leaves."""
        journal = record.directory / ARRIVING
        try:
            os.close(only_one(journal, wait=True))
        except FileNotFoundError:
            return
        coming = left_task(journal, Receive)
        if coming is not None:
            self.succeed(coming)
        elif journal.exists():
            # It had not come so far that the VM could have been ours.
            stop(record, self._registry)
