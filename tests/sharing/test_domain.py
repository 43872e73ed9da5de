"""Real processes in one domain: what they have in common is kept once, and stays what each of them wrote."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import RefusedError
from outboard.pages import LARGE
from outboard.pages.residency import Where
from outboard.sharing.domain import Domain, spans_of
from outboard.sharing.pool import Pool
from outboard.sharing.scan import SECRET
from tests.support.machine import transparent_huge_pages
from tests.support.requirements import require
from tests.support.sharing import ProcessMember, blocks_of
from tests.support.target import Target

PAGES = 1024
SUM = PAGES * (PAGES - 1) // 2


class Scene:
    """Three targets, each of whose pages holds its number, in one domain."""

    def __init__(self, directory: Path) -> None:
        self.pool = Pool(directory / "pool", np.random.default_rng(5), slots=1 << 16)
        self.members = [ProcessMember(name, directory, self.pool.fileno()) for name in ("a", "b", "c")]
        secret = np.random.default_rng(6).integers(0, 256, SECRET, dtype=np.uint8)
        self.domain = Domain(self.members, self.pool, secret)

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.pool.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    require("root")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    made = Scene(directory)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(directory)


def test_three_copies_become_one(scene: Scene) -> None:
    assert scene.domain.round().shared == 0
    done = scene.domain.round()
    # The first page of each holds the number 0, and goes as zeros.
    assert done.found.equal == 3 * (PAGES - 1)
    assert (done.found.contents, done.found.zeros) == (PAGES - 1, 3)
    assert done.found.shareable == 2 * (PAGES - 1) + 3
    assert (done.shared, done.zeros, done.failures) == (3 * (PAGES - 1), 3, {})
    assert sum(member.resident() for member in scene.members) == 0
    assert blocks_of(scene.pool.fileno()) == (PAGES - 1) * 4096
    for member in scene.members:
        assert member.target.ask("t").split()[1] == str(SUM)
        assert member.overlay.statistics().mappings < 60
    assert scene.domain.speed() > 0


def test_what_is_written_is_the_writer_s_and_is_shared_again_when_it_is_equal(scene: Scene) -> None:
    scene.domain.round()
    scene.domain.round()
    a, b, c = scene.members
    assert a.target.ask("w 7 5007") == "written"
    assert b.target.ask("r 7") == "7"
    assert len(a.overlay.copied()) == 1
    done = scene.domain.round()
    assert (done.tidied, done.shared) == (1, 0)
    assert a.where[7] == Where.RESIDENT
    for member in (b, c):
        member.target.ask("w 7 5007")
    for _ in range(3):
        scene.domain.round()
    assert [member.where[7] for member in scene.members] == [Where.SHARED] * 3
    # The slot that held the number 7 is free.
    assert scene.pool.used() == PAGES - 1
    assert [member.target.ask("t").split()[1] for member in scene.members] == [str(SUM + 5000)] * 3


def test_what_differs_is_not_shared(scene: Scene) -> None:
    a, b, c = scene.members
    for number, member in enumerate(scene.members):
        assert member.target.ask(f"w 9 {9000 + number}") == "written"
    scene.domain.round()
    scene.domain.round()
    assert [member.where[9] for member in (a, b, c)] == [Where.RESIDENT] * 3
    assert [member.target.ask("r 9") for member in (a, b, c)] == ["9000", "9001", "9002"]


def test_equal_pages_of_one_guest_are_shared_too(scene: Scene) -> None:
    alone = Domain(scene.members[:1], scene.pool, np.full(SECRET, 7, dtype=np.uint8))
    member = scene.members[0]
    for page in range(100, 110):
        member.target.ask(f"w {page} 100")
    alone.round()
    done = alone.round()
    assert (done.found.equal, done.found.contents, done.shared) == (10, 1, 10)
    assert scene.pool.used() == 1
    assert member.target.ask("w 105 105") == "written"
    assert [member.target.ask(f"r {page}") for page in (104, 105, 106)] == ["100", "105", "100"]


def test_a_digest_that_lies_shares_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all digests equal, BLAKE3 would tell; and were those equal as well, the comparison byte for byte."""
    monkeypatch.setattr(Pool, "digest", lambda *_: b"the same for all")
    scene.domain.round()
    done = scene.domain.round()
    # One page is what the one slot holds, and every member has it.
    assert done.shared == 3
    assert [member.target.ask("t").split()[1] for member in scene.members] == [str(SUM)] * 3


def test_a_member_that_fails_does_not_keep_the_others_from_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RefusedError("sharing", "not today")

    monkeypatch.setattr(scene.members[1], "share", refuse)
    scene.domain.round()
    done = scene.domain.round()
    assert done.shared == 2 * (PAGES - 1)
    assert list(done.failures) == ["b"]
    assert "not today" in done.failures["b"]
    scene.domain.leave("b")
    assert scene.domain.round().failures == {}


def test_a_secret_has_its_length(scene: Scene) -> None:
    with pytest.raises(ValueError, match="192 bytes"):
        Domain([], scene.pool, np.zeros(8, dtype=np.uint8))


def test_spans_come_longest_first() -> None:
    pages = np.array([1, 2, 5, 6, 7, 9], dtype=np.int64)
    slots = np.array([50, 51, 60, 61, 62, 63], dtype=np.int64)
    assert spans_of(pages, slots).tolist() == [[5, 60, 3], [1, 50, 2], [9, 63, 1]]
    assert spans_of(pages[:0], slots[:0]).shape == (0, 3)


def test_large_pages_stay_whole_until_memory_is_short_and_are_rebuilt(scene: Scene) -> None:
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    with transparent_huge_pages():
        members = [
            ProcessMember(f"t{number}", directory, scene.pool.fileno(), target=Target("thp", mebibytes=8))
            for number in range(2)
        ]
        domain = Domain(members, scene.pool, np.full(SECRET, 3, dtype=np.uint8))
        try:
            large = sum(len(member.large()) for member in members)
            assert large >= 2 * 3 * LARGE
            for _ in range(3):
                done = domain.round()
            # What is in large pages is left alone, however equal; the rest of the memory is shared.
            assert sum(len(member.large()) for member in members) == large
            inside = domain.inside()
            assert inside.pages > 2 * LARGE
            assert domain.inside(every=4).error > 0
            offered = inside.by_guest[0]
            assert domain.reclaim(LARGE // 2 * 4096, 64) >= 1
            chosen = sum(len(blocks) for blocks in domain.broken)
            for _ in range(2):
                done = domain.round()
            assert done.failures == {}
            assert sum(len(member.large()) for member in members) == large - chosen * LARGE
            assert domain.inside().pages < inside.pages
            assert offered > 0
            before = [len(blocks) for blocks in domain.broken]
            assert domain.rebuild() == (sum(before), {})
            assert sum(len(member.large()) for member in members) == large
            for member in members:
                assert member.target.ask("t").split()[1] == str(2048 * 2047 // 2)
                assert member.target.ask("w 700 1") == "written"
                assert member.pager.failure is None
        finally:
            for member in members:
                member.close()
            shutil.rmtree(directory)
