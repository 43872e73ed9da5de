"""Sharing domains as an agent sees to them: their processes are real, the VMs are processes of ours."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing import Pipe, forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from outboard.agent import sharing_domains
from outboard.agent.domains import Sharing, Stop, Tell, active, ask_domain
from outboard.agent.engines import Engines, first_answer
from outboard.agent.sharer import domain_directory, pool_path
from outboard.agent.sharing_domains import SharingDomains
from outboard.agent.tasks import Managing, Refused
from outboard.errors import NotFoundError, OutboardError, RefusedError, UnreachableError
from outboard.sharing.inside import Thresholds
from outboard.vmm.registry import Registry
from tests.support.cluster import wait_for
from tests.support.hosted import Hosted
from tests.support.requirements import require

DOMAINS = {"blue": ["a", "b"], "red": ["b", "c"]}


class Scene:
    """Two VMs, and who sees to the domains of their host."""

    def __init__(self, registry: Registry, engines: Engines) -> None:
        self.registry, self.engines = registry, engines
        self.vms = {name: Hosted(self.registry, name) for name in ("a", "b")}
        self.broken = 0
        self.seer = self.seers()

    def seers(self) -> SharingDomains:
        return SharingDomains(self.engines.start, self.manage, self.registry, DOMAINS)

    def manage(self, vm: str) -> Path:
        self.registry.get(vm)
        if self.broken:
            self.broken -= 1
            raise UnreachableError(f"the engine of {vm} is being replaced")
        return self.vms[vm].manage()

    def begin(self, name: str, every_s: float = 0.05) -> int:
        return self.seer.begin(name, every_s, every_s, Thresholds())

    def process(self, name: str = "blue", besides: int = 0) -> int:
        """The domain's process, once it is another."""
        found = [besides]

        def another() -> bool:
            with contextlib.suppress(OutboardError):
                found[0] = ask_domain(domain_directory(self.registry.root, name), Tell()).process
            return found[0] != besides

        wait_for(another, "another process")
        return found[0]

    def close(self) -> None:
        for vm in self.vms.values():
            vm.end()
            self.registry.remove(vm.name)
        for directory in active(self.registry.root):
            # It ends by itself when its last VM has; this only hurries it.
            with contextlib.suppress(OutboardError):
                ask_domain(directory, Stop())
        wait_for(lambda: not active(self.registry.root), "the end of every domain")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Their server takes seconds to start, so it is one for all."""
    require("root", "no-swap")
    root = tmp_path_factory.mktemp("run")
    made = Engines(Registry(root), root / "pki")
    made.warm()
    yield made
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # typeshed has neither


@pytest.fixture
def scene(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(sharing_domains, "_RETRY_S", 0.01)
    made = Scene(engines._registry, engines)
    try:
        yield made
    finally:
        made.close()


def test_who_may_share_with_whom(scene: Scene) -> None:
    with pytest.raises(NotFoundError, match="no VM named nobody"):
        scene.begin("nobody")
    with pytest.raises(NotFoundError, match="no VM named c"):
        scene.begin("red")
    assert active(scene.registry.root) == []
    process = scene.begin("blue")
    assert scene.process() == process != os.getpid()
    with pytest.raises(RefusedError, match="the domain blue shares already"):
        scene.begin("blue")
    with pytest.raises(RefusedError, match="b: shared in the domain blue already"):
        scene.begin("red")
    with pytest.raises(RefusedError, match="a: shared in the domain blue already"):
        scene.begin("a")
    ask_domain(domain_directory(scene.registry.root, "blue"), Stop())
    # A VM alone is a domain of its own.
    scene.begin("a")
    assert [one.vm for one in ask_domain(domain_directory(scene.registry.root, "a"), Tell()).members] == ["a"]


def test_a_process_that_dies_is_replaced_until_it_is_told_to_stop(scene: Scene) -> None:
    first = scene.begin("blue")
    wait_for(lambda: scene.vms["a"].look().shared > 0, "something shared")
    # At first its VMs cannot be managed either.
    scene.broken = 3
    os.kill(first, signal.SIGKILL)
    second = scene.process(besides=first)
    assert scene.broken == 0
    assert scene.vms["a"].look().shared > 0
    scene.vms["b"].end()
    os.kill(second, signal.SIGKILL)
    third = scene.process(besides=second)
    directory = domain_directory(scene.registry.root, "blue")
    assert [one.vm for one in ask_domain(directory, Stop()).members] == ["a"]
    wait_for(lambda: not Path(f"/proc/{third}/fd/0").exists(), "its end")
    assert not directory.exists()
    assert scene.vms["a"].look().shared == 0


def test_what_the_dead_leave_is_removed(scene: Scene) -> None:
    process = scene.begin("blue", every_s=3600)
    pool = pool_path(scene.registry.root, "blue")
    assert pool.exists()
    for vm in scene.vms.values():
        vm.end()
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not domain_directory(scene.registry.root, "blue").exists(), "nothing left")
    assert not pool.exists()


def test_domains_outlive_the_agent(scene: Scene) -> None:
    for vm in scene.vms.values():
        vm.manage()
    # As an agent that is gone has left it: nobody watches.
    left = scene.engines.start(Sharing("blue", ("a", "b"), every_s=0.05))
    process = first_answer(left, 60, "the process")
    scene.seers().adopt()
    assert scene.process() == process
    os.kill(process, signal.SIGKILL)
    another = scene.process(besides=process)
    os.kill(another, signal.SIGKILL)
    # Nobody had to look while no agent ran.
    assert scene.process(besides=another) != process


def answering(what: bytes | None) -> Connection:
    """A pipe whose other end says that, or hangs up."""
    ours, theirs = Pipe()
    if what is not None:
        theirs.send_bytes(what)
    theirs.close()
    return ours


def test_the_first_answer_of_an_engine() -> None:
    assert first_answer(answering(msgspec.json.encode(Managing(engine=77))), 1, "it") == 77
    with pytest.raises(RefusedError, match="not this one"):
        first_answer(answering(msgspec.json.encode(Refused(why="not this one", exit_code=4))), 1, "it")
    with pytest.raises(UnreachableError, match="it died at once"):
        first_answer(answering(None), 1, "it")
    ours, theirs = Pipe()
    with pytest.raises(UnreachableError, match=r"it was not ready in 0\.01 s"):
        first_answer(ours, 0.01, "it")
    assert ours.closed
    theirs.close()
