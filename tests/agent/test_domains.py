"""The process of a sharing domain, in a thread, over real processes and the engines that manage them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.agent import domains
from outboard.agent.domains import Running, Sharing, Stop, Tell, Told, active, ask_domain, forget, wanted_of
from outboard.agent.holding import CONTROL
from outboard.agent.sharer import domain_directory, pool_path
from outboard.errors import KernelError, NotFoundError, RefusedError, StoreFullError, UnreachableError
from outboard.linux import proc, psi
from outboard.pager import mappings
from outboard.pages import PAGE_SIZE
from outboard.sharing.inside import Pressure
from outboard.sharing.pool import Pool
from outboard.sharing.reads import Pattern, Watch
from outboard.vmm.registry import Registry
from tests.support.cluster import wait_for
from tests.support.hosted import Hosted
from tests.support.requirements import require

PAGES = 1024
SUM = PAGES * (PAGES - 1) // 2
WORK = Sharing("blue", ("a", "b"), every_s=0.05, reads_s=0.05)


class Scene:
    """Two VMs of one content, and the domain that they are to share in."""

    def __init__(self, root: Path) -> None:
        self.registry = Registry(root)
        self.directory = domain_directory(root, "blue")
        self.pool = pool_path(root, "blue")
        self.a, self.b = (Hosted(self.registry, name) for name in ("a", "b"))
        for vm in (self.a, self.b):
            vm.manage()
        self._thread: threading.Thread | None = None

    def begin(self, work: Sharing = WORK) -> None:
        running = Running(work, self.registry)
        self._thread = threading.Thread(target=running.serve)
        self._thread.start()

    def ended(self) -> None:
        """Wait until the domain's process has ended."""
        assert self._thread is not None
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._thread = None

    def told(self) -> Told:
        return ask_domain(self.directory, Tell())

    def until(self, condition: Callable[[Told], bool], what: str) -> Told:
        wait_for(lambda: condition(self.told()), what)
        return self.told()

    def left(self) -> list[Path]:
        """What there is of the domain's."""
        return [path for path in (self.directory, self.pool) if path.exists()]

    def close(self) -> None:
        for vm in (self.a, self.b):
            vm.end()
        if self._thread is not None:
            # Their engines have ended with them, so that nothing is in its way; it may have ended by itself.
            with contextlib.suppress(NotFoundError, UnreachableError):
                ask_domain(self.directory, Stop())
            self.ended()
        self.pool.unlink(missing_ok=True)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    require("root", "no-swap")
    made = Scene(tmp_path)
    try:
        yield made
    finally:
        made.close()


def everything(told: Told) -> bool:
    """Whether all of both is shared, but for the page of zeros that begins each."""
    return sum(one.shared for one in told.members) == 2 * (PAGES - 1) * PAGE_SIZE


def test_what_is_told_and_that_stop_undoes_it(scene: Scene) -> None:
    before = [len(proc.maps(vm.target.pid)) for vm in (scene.a, scene.b)]
    with pytest.raises(NotFoundError, match="no sharing domain blue is active"):
        scene.told()
    scene.begin()
    assert active(scene.registry.root) == [scene.directory]
    assert wanted_of(scene.directory) == WORK
    told = scene.until(lambda now: everything(now) and not now.shareable, "all shared")
    assert (told.domain, told.process) == ("blue", os.getpid())
    assert told.pool == (PAGES - 1) * PAGE_SIZE == told.saved
    assert (told.zeros, told.unstable) == (2 * PAGE_SIZE, 0)
    assert [(one.vm, one.copied, one.failure) for one in told.members] == [("a", 0, None), ("b", 0, None)]
    assert [vm.look().domain for vm in (scene.a, scene.b)] == ["blue", "blue"]
    # A write is the writer's own, and is told until the next round has tidied up.
    assert scene.a.target.ask("w 7 5007") == "written"
    scene.until(lambda now: sum(one.shared for one in now.members) == (2 * PAGES - 3) * PAGE_SIZE, "tidied up")
    assert [vm.total() for vm in (scene.a, scene.b)] == [SUM + 5000, SUM]
    last = ask_domain(scene.directory, Stop())
    assert (last.pool, last.shared, last.saved) == (0, 0, 0)
    scene.ended()
    assert scene.left() == []
    for vm, mapped in zip((scene.a, scene.b), before, strict=True):
        now = vm.look()
        assert (now.shared, now.copied, now.domain) == (0, 0, None)
        assert len(proc.maps(vm.target.pid)) == mapped
        assert "outboard-hand" not in [thread.name for thread in proc.threads(vm.target.pid)]
    assert [vm.total() for vm in (scene.a, scene.b)] == [SUM + 5000, SUM]


def test_a_vm_that_ends_leaves_and_the_last_one_ends_the_domain(scene: Scene) -> None:
    scene.begin()
    scene.until(everything, "all shared")
    scene.b.end()
    told = scene.until(lambda now: len(now.members) == 1, "one member")
    assert (told.members[0].vm, told.members[0].failure) == ("a", None)
    assert scene.a.total() == SUM
    scene.a.release()
    scene.ended()
    assert scene.left() == []
    assert scene.a.total() == SUM


def test_an_engine_that_dies_is_told_and_its_successor_is_taken(scene: Scene) -> None:
    scene.begin()
    scene.until(everything, "all shared")
    scene.b.leave()
    told = scene.until(lambda now: now.members[1].failure is not None, "the failure of b")
    assert told.members[0].failure is None
    assert "no answer from the engine" in (told.members[1].failure or "")
    # What b has cannot be given back now, so the domain goes on.
    with pytest.raises(UnreachableError):
        ask_domain(scene.directory, Stop())
    scene.b.manage()
    scene.until(lambda now: everything(now) and now.members[1].failure is None, "all shared again")
    assert [vm.total() for vm in (scene.a, scene.b)] == [SUM, SUM]
    ask_domain(scene.directory, Stop())
    scene.ended()
    assert (scene.left(), scene.b.look().shared) == ([], 0)


def test_a_vm_that_ends_together_with_its_engine_is_in_nobody_s_way(scene: Scene) -> None:
    scene.begin(Sharing("blue", ("a", "b"), every_s=3600, reads_s=3600))
    control = scene.b.control
    scene.b.leave()
    scene.b.end()
    assert control.exists()
    assert [one.vm for one in ask_domain(scene.directory, Stop()).members] == ["a", "b"]
    scene.ended()
    assert scene.left() == []


def test_another_vm_of_the_same_name_is_not_taken_for_it(scene: Scene) -> None:
    scene.begin()
    scene.until(everything, "all shared")
    scene.b.leave()
    scene.b.end()
    scene.b = Hosted(scene.registry, "b")
    scene.b.manage()
    scene.until(lambda now: [one.vm for one in now.members] == ["a"], "a alone")
    assert scene.b.look().domain is None


def test_what_cannot_begin_leaves_nothing(scene: Scene) -> None:
    with pytest.raises(NotFoundError, match="no VM named c"):
        Running(Sharing("blue", ("a", "c")), scene.registry)
    assert scene.left() == []
    scene.b.release()
    with pytest.raises(NotFoundError, match="the memory of b is not managed"):
        Running(WORK, scene.registry)
    assert scene.left() == []
    scene.begin(Sharing("blue", ("a",)))
    with pytest.raises(RefusedError, match="the domain blue shares already"):
        Running(WORK, scene.registry)
    with pytest.raises(RefusedError, match="the domain blue shares already"):
        forget(scene.registry.root, "blue")
    assert scene.told().process == os.getpid()


def test_what_a_dead_process_left_is_removed(scene: Scene) -> None:
    scene.begin()
    scene.until(everything, "all shared")
    ask_domain(scene.directory, Stop())
    scene.ended()
    forget(scene.registry.root, "blue")
    scene.directory.mkdir(parents=True)
    (scene.directory / "domain.json").write_text("{}")
    scene.pool.touch()
    forget(scene.registry.root, "blue")
    assert scene.left() == []


def test_mappings_are_left_to_the_vmm(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other page differs, so that each page that is shared is a mapping, and cuts another in two.
    for page in range(1, PAGES, 2):
        scene.a.target.ask(f"w {page} {page + 100_000}")
    now = len(proc.maps(scene.a.target.pid))
    limit = tmp_path / "max_map_count"
    limit.write_text(str(4096 + now + 100))
    monkeypatch.setattr(mappings, "MAX_MAP_COUNT", limit)
    scene.begin()
    told = scene.until(lambda told: told.scans > 5 and told.shared > 0, "some shared")
    assert max(len(proc.maps(vm.target.pid)) for vm in (scene.a, scene.b)) <= now + 100
    assert 0 < told.members[0].shared < 51 * PAGE_SIZE
    assert [one.failure for one in told.members] == [None, None]
    limit.write_text("65530")
    scene.until(lambda now: now.members[0].shared == (PAGES // 2 - 1) * PAGE_SIZE, "every equal page shared")
    assert scene.b.total() == SUM


def test_a_page_that_is_read_much_gets_private_memory(scene: Scene) -> None:
    watch = Watch(patterns=(Pattern("often", 2, 60.0),), jitter_s=0.0)
    scene.begin(Sharing("blue", ("a", "b"), every_s=0.05, reads_s=0.02, watch=watch))
    scene.until(everything, "all shared")

    def read(now: Told) -> bool:
        for page in (10, 20, 30):
            assert scene.a.target.ask(f"r {page}") == str(page)
        return now.members[0].read_much["often"] == 3

    told = scene.until(read, "three pages un-shared")
    assert told.members[1].read_much == {"often": 0}
    wait_for(lambda: scene.a.look().shared == (PAGES - 4) * PAGE_SIZE, "three private pages")
    # Not shared again at the next scan.
    scans = scene.told().scans
    scene.until(lambda now: now.scans > scans + 3, "more scans")
    assert scene.a.look().shared == (PAGES - 4) * PAGE_SIZE
    assert scene.b.look().shared == (PAGES - 1) * PAGE_SIZE


def test_want_of_memory_for_the_pool_is_told_and_passes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Pool.put
    full = threading.Event()
    full.set()

    def refuse(pool: Pool, content: NDArray[np.uint8], digests: list[bytes]) -> object:
        if full.is_set():
            raise StoreFullError("the sharing pool has no room today")
        return put(pool, content, digests)

    monkeypatch.setattr(Pool, "put", refuse)
    scene.begin()
    told = scene.until(lambda now: now.members[0].failure is not None, "a failure")
    assert "no room today" in (told.members[0].failure or "")
    assert (told.shared, scene.a.total()) == (0, SUM)
    full.clear()
    scene.until(lambda now: everything(now) and now.members[0].failure is None, "all shared")


def test_memory_that_cannot_be_read_keeps_no_other_from_sharing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(member: domains.EngineMember) -> object:
        if member.name == "b":
            raise KernelError("a look at the pages of b", 3)
        return set_of(member)

    set_of = domains.EngineMember.populated
    monkeypatch.setattr(domains.EngineMember, "populated", refuse)
    for page in range(500, 600):
        scene.a.target.ask(f"w {page} 500")
    scene.begin()
    told = scene.until(lambda now: now.members[0].shared == 100 * PAGE_SIZE, "what a has twice shared")
    assert told.members[0].failure is None
    assert "a look at the pages of b" in (told.members[1].failure or "")
    assert told.members[1].shared == 0


def test_what_is_no_order_is_not_answered(scene: Scene) -> None:
    scene.begin()
    for words in (b'{"type":"explode"}', b"nonsense", b""):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(scene.directory / CONTROL))
            with Connection(os.dup(client.fileno())) as connection:
                connection.send_bytes(words)
                with pytest.raises((EOFError, OSError)):
                    connection.recv_bytes()
    assert scene.told().domain == "blue"


def test_a_process_that_ends_before_it_answers(tmp_path: Path) -> None:
    directory = tmp_path / "sharing" / "blue"
    directory.mkdir(parents=True)
    (directory / "domain.json").touch()
    with pytest.raises(UnreachableError, match="sharing domain"):
        ask_domain(directory, Tell())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / CONTROL))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(UnreachableError, match="ended before it answered"):
            ask_domain(directory, Tell())
        thread.join()


def test_pressure_without_the_kernel_s_word_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise KernelError("read of /proc/pressure/memory", 95)

    monkeypatch.setattr(psi, "stalled_share", refuse)
    now = domains._pressure()
    assert isinstance(now, Pressure)
    assert now.available > 0
    assert now.stalled == 0.0
    monkeypatch.setattr(psi, "stalled_share", lambda: 12.5)
    assert domains._pressure().stalled == 12.5
