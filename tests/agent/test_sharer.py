"""What an engine does when it is told to share, over its control socket; a real process is the guest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.agent.orders import DropZeros, Look, Order, ReadRound, Rebuild, Share, Tidy, Unshare, ask
from outboard.agent.sharer import domain_directory, pool_path
from outboard.errors import OutboardError, RefusedError, UsageError
from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.sharing.pool import SLOTS
from outboard.sharing.reads import Pattern, Watch
from outboard.vmm.registry import Registry
from tests.support.hosted import Hosted
from tests.support.requirements import require

PAGES = 1024
SUM = PAGES * (PAGES - 1) // 2


class Scene:
    """A managed VM, and pools of the domains blue and red whose slots hold what its pages hold."""

    def __init__(self, root: Path) -> None:
        self.vm = Hosted(Registry(root), "web")
        self.vm.manage()
        self.pools = [pool_path(root, name) for name in ("blue", "red")]
        content = b"".join(page.to_bytes(8, "little").ljust(PAGE_SIZE, b"\0") for page in range(PAGES))
        for pool in self.pools:
            pool.parent.mkdir(parents=True, exist_ok=True)
            pool.write_bytes(content)
            os.truncate(pool, SLOTS * PAGE_SIZE)

    def moved(self, order: Order) -> int:
        return ask(self.vm.control, order).moved // PAGE_SIZE

    def share(self, *spans: tuple[int, int, int], domain: str = "blue") -> int:
        return self.moved(Share(domain, list(spans)))

    @property
    def named(self) -> Path:
        return self.vm.directory / "sharing"

    def close(self) -> None:
        self.vm.end()
        for pool in self.pools:
            pool.unlink(missing_ok=True)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    require("root", "no-swap")
    made = Scene(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_the_domain_is_known_from_the_first_page_to_the_last(scene: Scene) -> None:
    for order in (DropZeros([(0, 1)]), Tidy(), ReadRound(), Rebuild([0]), Unshare(), Unshare([(1, 5)])):
        assert scene.moved(order) == 0
    assert not scene.named.exists()
    assert scene.share((1, 1, 100), (900, 800, 3)) == 100
    assert scene.named.read_text() == "blue"
    looked = ask(scene.vm.control, Look())
    assert (looked.shared, looked.copied, looked.domain) == (100 * PAGE_SIZE, 0, "blue")
    scene.vm.target.ask("w 5 55")
    assert ask(scene.vm.control, Look()).copied == PAGE_SIZE
    assert scene.moved(Tidy()) == 1
    # A page of zeros is given up, one that is none is not.
    scene.vm.target.ask("w 700 0")
    assert scene.moved(DropZeros([(700, 2)])) == 1
    assert scene.moved(Unshare([(50, 10), (500, 3)])) == 10
    assert scene.moved(Unshare()) == 89
    assert not scene.named.exists()
    assert scene.vm.total() == SUM + 50 - 700
    assert "outboard-hand" not in [thread.name for thread in proc.threads(scene.vm.target.pid)]
    # It may join another now.
    assert scene.share((1, 1, 1), domain="red") == 1


def test_what_no_guest_has_is_refused(scene: Scene) -> None:
    for spans in (
        [(PAGES - 1, 0, 2)],
        [(-1, 0, 1)],
        [(1, -1, 1)],
        [(1, 1, 0)],
        [(1, 1, -4)],
        [(1, SLOTS, 1)],
        [(1, SLOTS - 1, 5)],
        [(1, 1 << 62, 1)],
        [(1, 1 << 63, 1)],
        [(1 << 62, 1, 1 << 62)],
    ):
        with pytest.raises(UsageError):
            scene.share(*spans)
    with pytest.raises(UsageError, match="no name of a sharing domain"):
        scene.share((1, 1, 1), domain="../etc")
    assert scene.share((7, 7, 1)) == 1
    for order in (Unshare([(0, PAGES + 1)]), Unshare([(1 << 62, 1)]), Rebuild([-1]), Rebuild([1 << 60])):
        with pytest.raises(UsageError, match="has no such pages"):
            scene.moved(order)
    # The last slots of the pool, which hold nothing.
    assert scene.share((1, SLOTS - 5, 5)) == 0
    assert scene.vm.total() == SUM


def test_one_domain_at_a_time(scene: Scene) -> None:
    assert scene.share((1, 1, 2)) == 2
    with pytest.raises(RefusedError, match="shares in blue already"):
        scene.share((5, 5, 2), domain="red")
    assert scene.share((5, 5, 2)) == 2


def test_a_pool_that_is_not_there_or_is_a_link(scene: Scene) -> None:
    scene.pools[0].rename(scene.pools[0].with_name("elsewhere"))
    with pytest.raises(OutboardError, match="open of the sharing pool"):
        scene.share((1, 1, 2))
    scene.pools[0].symlink_to(scene.pools[0].with_name("elsewhere"))
    with pytest.raises(OutboardError, match="open of the sharing pool"):
        scene.share((1, 1, 2))
    scene.pools[0].with_name("elsewhere").unlink()
    assert not scene.named.exists()
    assert ask(scene.vm.control, Look()).domain is None


def test_a_successor_goes_on_in_the_same_pool(scene: Scene) -> None:
    assert scene.share((1, 1, 200)) == 200
    scene.vm.leave()
    # It waits until somebody answers its fault.
    scene.vm.target.say("w 7 77")
    scene.vm.manage()
    assert scene.vm.target.answer() == "written"
    looked = scene.vm.look()
    assert (looked.shared, looked.copied, looked.domain) == (200 * PAGE_SIZE, PAGE_SIZE, "blue")
    assert scene.share((300, 300, 5)) == 5
    assert scene.moved(Unshare()) == 205
    assert scene.vm.total() == SUM + 70


def test_pages_that_met_a_pattern_are_not_shared_again(scene: Scene) -> None:
    watch = Watch(patterns=(Pattern("once", 1, 60.0),), jitter_s=0.0)
    assert scene.share((1, 1, 50)) == 50
    scene.moved(ReadRound(watch))
    assert [scene.vm.target.ask(f"r {page}") for page in (10, 11)] == ["10", "11"]
    assert scene.moved(ReadRound(watch)) == 2
    assert scene.vm.look().read_much == {"once": 2}
    assert scene.share((10, 10, 2)) == 0
    assert scene.share((9, 9, 4), (60, 60, 2)) == 2
    assert scene.vm.look().shared == 50 * PAGE_SIZE
    # Nothing is taken for read that was un-shared and shared anew.
    scene.moved(Unshare())
    assert scene.share((20, 20, 5)) == 5
    assert scene.moved(ReadRound()) == 0
    assert scene.vm.look().read_much == {"once": 2}


def test_where_a_pool_is(tmp_path: Path) -> None:
    assert domain_directory(tmp_path, "a-b.c_1") == tmp_path / "sharing" / "a-b.c_1"
    for name in ("", ".", "..", "a/b", "-a", "a" * 65, "a\n"):
        with pytest.raises(UsageError, match="no name of a sharing domain"):
            domain_directory(tmp_path, name)
    there = pool_path(Path("/dev/shm"), "blue")
    assert there == Path("/dev/shm/sharing/blue/pool")
