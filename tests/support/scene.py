"""One VM that is migrated to and fro while things go wrong, and what must be so after each of them."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from guest.build import Image
from outboard.errors import KernelError, OutboardError
from outboard.linux import cgroup, pidfd
from tests.support.cluster import WAIT_S, Cluster, Host, Vm, wait_for
from tests.support.cutting import cut
from tests.support.following import Follower
from tests.support.holding import HeldAtLink
from tests.support.link import Link
from tests.support.matrix import Fault, Moment, Outcome, Place
from tests.support.processes import calling, connected, engines, kill, processes

_KEPT = {"vm.json", "spec.toml", "qmp.sock", "engine.sock", "guest-agent.sock", "console.log", "qemu.log"}
"""What the directory of a VM that runs holds."""
_SLOW = ("--max-bandwidth", "20MB")
_OPTIONS: dict[Moment, tuple[str, ...]] = {
    Moment.COPYING: ("--pre-copy", "--no-hints", *_SLOW),
    Moment.SWITCHING: ("--verify", *_SLOW),
}
_MUTE = {
    Fault.SOURCE_MUTE: ("source",),
    Fault.TARGET_MUTE: ("target",),
    Fault.BOTH_MUTE: ("source", "target"),
}


class Scene:
    """A cluster of two hosts on a link, and a VM in it that writes to its memory.

    :ivar source: where the VM is; :ivar target: where it will go.
    """

    def __init__(self, cluster: Cluster, link: Link, image: Image) -> None:
        self.cluster, self._link, self._image = cluster, link, image
        self._made = 0
        self.source, self.target = cluster.a, cluster.b
        self.vm: Vm
        self.boot()

    def boot(self) -> None:
        """Have a VM that runs at host a."""
        self._made += 1
        self.vm = Vm(self.cluster, self._image, f"web{self._made}")
        self.vm.write(32, 1500)
        self.source, self.target = self.cluster.a, self.cluster.b

    def reach(self, moment: Moment, follower: Follower, until: contextlib.ExitStack) -> Callable[[], None]:
        """Bring a migration to ``moment`` and hold it there; what lets it go."""
        if moment is Moment.PREPARING:
            return self._hold_vmm(follower, until)
        if moment in (Moment.COMMITTED, Moment.TAKEN):
            wait_for(lambda: engines(self.target), "the destination's engine")
            held = until.enter_context(HeldAtLink(engines(self.target)[0], after=moment is Moment.TAKEN))
            follower.wait_state(moment.state)
            wait_for(lambda: held.held, "the commit at the destination")
            return held.let_go
        if moment is Moment.RECOVERING:
            follower.wait_state(Moment.POSTCOPY.state)
            (engine,) = engines(self.target)
            let_go = self._stop(engine, until)
            (ours,) = engines(self.source)
            assert cut(ours)
            follower.wait_state(moment.state)
            return let_go
        follower.wait_state(moment.state)
        return lambda: None

    def _hold_vmm(self, follower: Follower, until: contextlib.ExitStack) -> Callable[[], None]:
        """Stop the destination's QEMU as soon as it is there, and wait for the streams."""
        found: list[int] = []

        def started() -> bool:
            found[:] = [pid for pid, name in processes(self.target) if name.startswith("qemu-system")]
            return bool(found)

        wait_for(started, "the destination's QEMU")
        let_go = self._stop(found[0], until)
        follower.wait_state(Moment.PREPARING.state)
        # The call to the agent, and the three streams.
        wait_for(lambda: sum(connected(engine) for engine in engines(self.source)) >= 4, "the streams")
        return let_go

    @staticmethod
    def _stop(pid: int, until: contextlib.ExitStack) -> Callable[[], None]:
        process = pidfd.open(pid)

        def let_go() -> None:
            with contextlib.suppress(KernelError):
                pidfd.send_signal(process, signal.SIGCONT)

        until.callback(pidfd.close, process)
        until.callback(let_go)
        pidfd.send_signal(process, signal.SIGSTOP)
        return let_go

    def inflict(self, fault: Fault, moment: Moment, let_go: Callable[[], None]) -> None:
        """Have ``fault`` happen, and let the migration go on as far as it can."""
        if fault in _MUTE:
            self._mute(_MUTE[fault], let_go if moment is Moment.RECOVERING else None)
            if moment is Moment.COMMITTED:
                self._await_verdict()
            let_go()
            return
        if fault is Fault.CUT and moment is Moment.RECOVERING:
            let_go()
            wait_for(lambda: any(cut(engine) for engine in engines(self.source)), "a call that can be cut")
            return
        assert self._strike(fault), f"nobody was there to be hit by {fault.value}"
        if moment is Moment.COMMITTED and fault in (Fault.CUT, Fault.SOURCE_ENGINE):
            self._await_verdict()
        let_go()

    def _await_verdict(self) -> None:
        """The source has asked what became of its commit before the destination's engine takes it."""
        incoming = self.target.directory / "state" / "incoming"
        coming = max(incoming.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        wait_for(coming.with_suffix(".verdict").exists, "the destination's verdict")

    def strike(self, fault: Fault) -> bool:
        """Have ``fault`` happen, whatever the migration is at; whether anybody was there to be hit."""
        if fault in _MUTE:
            return self._mute(_MUTE[fault])
        return self._strike(fault)

    def _strike(self, fault: Fault) -> bool:
        match fault:
            case Fault.CANCEL:
                # 4: too late.
                return self.source.outboard("cancel", self.vm.name).returncode in (0, 4)
            case Fault.SOURCE_AGENT | Fault.TARGET_AGENT:
                host = self.source if fault is Fault.SOURCE_AGENT else self.target
                host.kill_agent()
                host.start_agent()
                return True
            case Fault.SOURCE_ENGINE | Fault.TARGET_ENGINE:
                found = engines(self.source if fault is Fault.SOURCE_ENGINE else self.target)
            case Fault.SOURCE_VMM | Fault.TARGET_VMM:
                host = self.source if fault is Fault.SOURCE_VMM else self.target
                found = [pid for pid, name in processes(host) if name.startswith("qemu-system")]
            case _:
                return bool(sum(cut(engine) for engine in engines(self.source)))
        for pid in found:
            kill(pid)
        return bool(found)

    def _mute(self, who: tuple[str, ...], once_lost: Callable[[], None] | None = None) -> bool:
        """Lose what ``who`` send until both have noticed; after ``once_lost``, until the source has called in vain."""
        hosts = {"source": self.source, "target": self.target}
        both = [*engines(self.source), *engines(self.target)]
        self._link.lose(*(hosts[one].name for one in who))
        try:
            if once_lost is not None:
                once_lost()
                wait_for(lambda: any(map(calling, engines(self.source))), "the source's call")
            else:
                wait_for(lambda: not any(map(connected, both)), "the hosts' notice of the silence")
        finally:
            self._link.lose()
        return bool(both)

    def play(self, moment: Moment, fault: Fault) -> tuple[Outcome, float | None]:
        """Migrate, and have ``fault`` happen at ``moment``; what came of it, and how long until somebody saw to it."""
        options = _OPTIONS.get(moment, ("--post-copy", *_SLOW))
        with Follower(self.source, self.vm.name, self.target.name, *options) as follower, contextlib.ExitStack() as end:
            let_go = self.reach(moment, follower, end)
            struck = time.monotonic()
            self.inflict(fault, moment, let_go)
            if not follower.over:
                self.source.outboard("limit", self.vm.name, "none")
            code = follower.end()
            state, repaired = follower.last_state(), follower.repaired(struck)
        return Outcome(code, state, self.settle()), repaired

    def settle(self) -> Place:
        """Wait until no engine is at work any more, and see that nothing is left over; where the VM is."""
        wait_for(lambda: not self._at_work(), "the engines' end")
        deadline = time.monotonic() + WAIT_S
        while left := self.left_over():
            assert time.monotonic() < deadline, f"still left over after {WAIT_S:.0f} s: {left}"
            time.sleep(0.1)
        return self.place()

    def _at_work(self) -> list[int]:
        return [engine for host in self.cluster.hosts.values() for engine in engines(host)]

    def place(self) -> Place:
        """Where the VM runs, after it has verified its memory there.

        :raise AssertionError: two copies run, or one that does not find its memory as it left it.
        """
        running = [host for host in (self.source, self.target) if host.has(self.vm.name) and self._runs(host)]
        assert len(running) <= 1, "two copies run"
        if not running:
            return Place.STOPPED if self.source.has(self.vm.name) else Place.GONE
        self.vm.verify(running[0].name)
        return Place.SOURCE if running[0] is self.source else Place.TARGET

    def _runs(self, host: Host) -> bool:
        try:
            with self.vm.record(host.name).attach() as guest:
                return bool(guest.monitor.execute("query-status")["running"])
        except OutboardError:
            return False

    def left_over(self) -> list[str]:
        """What a migration has left behind that is over."""
        found = []
        for host in self.cluster.hosts.values():
            records = {record.pid: record for record in host.registry.list() if record.alive}
            for pid, name in processes(host):
                if name.startswith("outboard-") or (name.startswith("qemu-system") and pid not in records):
                    found.append(f"process {pid} {name} at {host.name}")
            named = {record.name: record for record in host.registry.list()}
            for directory in (host.runtime / "vms").glob("*"):
                kept = _KEPT | ({"departing"} if self._is_stopped(host) else set())
                left = [path.name for path in directory.glob("*") if path.name not in kept]
                if directory.name in named and not named[directory.name].alive:
                    # It has ended, and waits for outboard stop.
                    continue
                if left or directory.name not in named:
                    found.append(f"{directory}, with{'' if directory.name in named else 'out'} a record: {left}")
            for pid in records:
                with contextlib.suppress(KernelError):
                    found += [f"cgroup {name}" for name in cgroup.names(pid) if "outboard-brake" in name]
                    found += [f"userfaultfd of {pid} is registered" for _ in self._registered(pid)]
        return found

    def _is_stopped(self, host: Host) -> bool:
        return host is self.source and host.has(self.vm.name) and not self._runs(host)

    @staticmethod
    def _registered(pid: int) -> list[str]:
        """The mappings of a QEMU that a userfaultfd watches."""
        flags = [line.split()[1:] for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if "VmFlags:" in line]
        return [flag for each in flags for flag in each if flag in ("um", "uw", "ui")]

    def kept(self) -> str:
        """How the last migration ended, as the source's history has it."""
        told = self.source.outboard("history", self.vm.name, "--last", "1", "-o", "ndjson").stdout
        return str(json.loads(told)["state"]) if told else "nothing is kept"

    def go_on(self, place: Place) -> None:
        """Be ready for the next migration, from where the VM is, or with another one."""
        if place is Place.TARGET:
            self.source, self.target = self.target, self.source
        elif place is not Place.SOURCE:
            self._boot_another()

    def start_over(self) -> None:
        """After a round that went wrong: keep nothing of it."""
        self._link.lose()
        for engine in self._at_work():
            kill(engine)
        self._boot_another()

    def _boot_another(self) -> None:
        for host in self.cluster.hosts.values():
            for record in host.registry.list():
                host.outboard("stop", record.name)
        self.boot()
