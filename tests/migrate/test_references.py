"""Pages that go as references to blocks of disks: sent, found or refused, and sent after all."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import OutboardError, PeerError
from outboard.migrate import messages, ranking
from outboard.migrate import references as references_module
from outboard.migrate.messages import AllSent, Barrier, ImagesSeen
from outboard.migrate.outbox import Outbox
from outboard.migrate.receiving import BulkReceiver
from outboard.migrate.references import Lookup, References
from outboard.migrate.sending import BulkSender, Say, Send, decode_done, encode_order
from outboard.migrate.worker import Worker
from outboard.pager.arriving import ArrivingMemory
from outboard.pages import PAGE_SIZE
from outboard.pages.pageset import Runs
from outboard.stores.disk import DiskStore
from outboard.stores.images.images import Images
from outboard.stores.images.sampling import sample
from outboard.vmm.guest import Guest
from outboard.vmm.spec import Disk
from outboard.wire.channel import Channel
from tests.support.process_guest import guest_of
from tests.support.target import Target

MIB = 32
PAGES = MIB << 8
HELD = 6000
"""So many pages of the source's, from its page 1000 on, are on the disk, from its block 3 on."""


class Memory:
    """The destination's memory, as the receiver fills it."""

    def __init__(self) -> None:
        self.content: NDArray[np.uint8] = np.zeros((PAGES, PAGE_SIZE), dtype=np.uint8)
        self.times: NDArray[np.int64] = np.zeros(PAGES, dtype=np.int64)

    def place(self, runs: Runs, zero: NDArray[np.bool_], content: NDArray[np.uint8]) -> NDArray[np.int64]:
        numbers = np.concatenate([np.arange(first, first + count) for first, count in runs.tolist()])
        assert numbers.size == zero.size
        self.times[numbers] += 1
        self.content[numbers[zero]] = 0
        self.content[numbers[~zero]] = content.reshape(-1, PAGE_SIZE)[: np.count_nonzero(~zero)]
        return np.empty(0, dtype=np.int64)


class Scene:
    def __init__(self, directory: Path, guest: Guest, here: Path, there: Path, *, agree: bool = True) -> None:
        self.guest = guest
        self.outbox = Outbox(PAGES)
        self.outbox.rank[:] = ranking.UNCLASSED
        # A gigabit: on a faster link a busy machine may find that looking does not pay.
        self.outbox.limit = 125_000_000
        self.references = References([Disk(path=str(here), read_only=True)], directory / "indexes", enabled=True)
        assert self.references.wanted
        Worker("test-index", lambda _: self.references.make_indexes()).join()
        self.images = Images([Disk(path=str(there), read_only=True)])
        asked = self.references.ask()
        seen = [sample(file, asked.nonce) for file in self.images.files]
        self.references.answered(ImagesSeen(seen if agree else [""]))
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = Channel(socket.create_connection(server.getsockname()), "b", PAGES)
            far = Channel(server.accept()[0], "a", PAGES)
        self.memory = Memory()
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sockets = near, far, self.link, theirs
        memory = cast(ArrivingMemory, self.memory)
        receiver = BulkReceiver(memory, far, theirs, theirs, DiskStore(self.images.files))

        def receive() -> None:
            with contextlib.suppress(OutboardError):
                receiver.serve()

        self.thread = threading.Thread(target=receive, daemon=True)
        self.worker = Worker(
            "test-bulk",
            lambda link: BulkSender(guest, self.outbox, near, link, references=self.references).serve(),
        )
        self.thread.start()

    def send(self) -> None:
        """Send everything and hear that it has been placed."""
        self.worker.tell(encode_order(Send(0, PAGES, ranking.LAST, paced=False)))
        report = self.worker.hear(60)
        assert report is not None
        assert decode_done.decode(report).complete
        self.worker.tell(encode_order(Say(messages.encode(Barrier(1)))))
        assert messages.decode(self.link.recv(1000)) == Barrier(1)
        self.worker.tell(encode_order(Say(messages.encode(AllSent()))))
        self.thread.join(10)
        assert not self.thread.is_alive()
        buffer = bytearray(PAGES * PAGE_SIZE)
        self.guest.memory.read_into(0, memoryview(buffer))
        assert np.array_equal(self.memory.content.reshape(-1), np.frombuffer(buffer, dtype=np.uint8))

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.worker.end()
        for one in self.sockets:
            one.close()
        self.thread.join(10)
        self.references.close()
        self.images.close()


@pytest.fixture
def tireless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking never rests: on a busy machine it would seem not to pay."""
    monkeypatch.setattr(references_module, "_AHEAD_NS", 60e9)


@pytest.fixture
def guest(tireless: None) -> Iterator[Guest]:  # noqa: ARG001  # for what it does
    with Target(mebibytes=MIB) as target:
        made = guest_of(target)
        noise = np.random.default_rng(3).integers(0, 256, (PAGES, PAGE_SIZE), dtype=np.uint8)
        made.memory.write(0, noise.reshape(-1).data)
        yield made
        made.close()


@pytest.fixture
def image(guest: Guest, tmp_path: Path) -> Path:
    content = bytearray(HELD * PAGE_SIZE)
    guest.memory.read_into(1000, memoryview(content))
    path = tmp_path / "image"
    path.write_bytes(bytes(3 * PAGE_SIZE) + content)
    return path


def damaged(image: Path, blocks: Iterable[int]) -> Path:
    """A copy that another host has, and that is not quite the same."""
    raw = bytearray(image.read_bytes())
    for block in blocks:
        raw[block * PAGE_SIZE + 77] ^= 1
    other = image.with_name("other")
    other.write_bytes(raw)
    return other


def test_what_both_hosts_have_goes_as_references(guest: Guest, image: Path, tmp_path: Path) -> None:
    with Scene(tmp_path, guest, image, image) as scene:
        scene.send()
        sent = scene.outbox.statistics()
        assert sent.content.block_pages == HELD
        assert sent.content.refused_blocks == 0
        assert sent.bulk_bytes < (PAGES - HELD) * (PAGE_SIZE + 64) + 40 * HELD
        assert (scene.memory.times == 1).all()
        assert str(image) in scene.references.words


def test_blocks_that_differ_over_there_are_sent_after_all(guest: Guest, image: Path, tmp_path: Path) -> None:
    # Few enough that the samples agree, or else nothing is referred to: they are taken where the nonce says.
    there = damaged(image, [*range(50, 55), *range(HELD - 5, HELD)])
    with Scene(tmp_path, guest, image, there, agree=False) as scene:
        scene.references._agreed[:] = 1
        scene.send()
        content = scene.outbox.statistics().content
        assert (content.block_pages, content.refused_blocks) == (HELD, 10)


def test_a_storage_that_is_another_is_given_up_after_the_first_answer(
    guest: Guest, image: Path, tmp_path: Path
) -> None:
    there = damaged(image, range(3, HELD + 3))
    with Scene(tmp_path, guest, image, there, agree=False) as scene:
        scene.references._agreed[:] = 1
        scene.send()
        content = scene.outbox.statistics().content
        assert content.refused_blocks == content.block_pages
        assert 512 <= content.block_pages < 512 + 64


def test_what_is_no_files_page_is_not_looked_for(guest: Guest, image: Path, tmp_path: Path) -> None:
    with Scene(tmp_path, guest, image, image) as scene:
        scene.outbox.rank[:2000] = ranking.EARLY_UPTO
        scene.send()
        assert scene.outbox.statistics().content.block_pages == HELD - 1000


def test_what_the_destination_does_not_have_is_not_referred_to(guest: Guest, image: Path, tmp_path: Path) -> None:
    there = image.with_name("there")
    there.write_bytes(image.read_bytes()[:-PAGE_SIZE])
    with Scene(tmp_path, guest, image, there) as scene:
        scene.send()
        assert scene.outbox.statistics().content.block_pages == 0
        assert scene.references.words.startswith("none: the destination")


def test_a_disk_that_is_written_to_and_one_that_is_not_wanted(image: Path, tmp_path: Path) -> None:
    assert not References([Disk(path=str(image))], tmp_path, enabled=True).wanted
    assert not References([Disk(path=str(image), read_only=True)], tmp_path, enabled=False).wanted


def test_an_index_that_is_there_need_not_be_made(image: Path, tmp_path: Path) -> None:
    disks = [Disk(path=str(image), read_only=True)]
    first = References(disks, tmp_path, enabled=True)
    lacking = [first.lacks_indexes]
    first.make_indexes()
    again = References(disks, tmp_path, enabled=True)
    lacking += [first.lacks_indexes, again.lacks_indexes]
    image.write_bytes(bytes(PAGE_SIZE))
    lacking.append(References(disks, tmp_path, enabled=True).lacks_indexes)
    assert lacking == [True, False, False, True]
    for one in (first, again):
        one.close()


def test_samples_are_of_the_whole_size_and_of_places_that_the_asker_chooses(image: Path) -> None:
    other = damaged(image, range(1))
    with Images([Disk(path=str(path), read_only=True) for path in (image, image, other)]) as images:
        one, same, different = (sample(file, "ab" * 16) for file in images.files)
        assert one == same != different
        assert sample(images.files[0], "cd" * 16) != one
        for nonce in ("", "x" * 32, "ab" * 17):
            with pytest.raises(PeerError, match="nonce"):
                sample(images.files[0], nonce)


def test_a_destination_that_asks_for_more_than_there_was_is_not_believed(
    guest: Guest, image: Path, tmp_path: Path
) -> None:
    with Scene(tmp_path, guest, image, image) as scene:
        scene.sockets[1].send_request(list(range(PAGES)))
        scene.worker.tell(encode_order(Send(0, PAGES, ranking.LAST, paced=False)))
        with pytest.raises(OutboardError, match="asks for"):
            scene.worker.hear(30)


class Clocks:
    """A wire that a page takes 32 us of, and what looking takes, by the clock and of the processor."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits, self.whole_ns, self.ratio = waits, 32_000.0, 0.5
        self.now = self.used = self.waited = self.sectors = self.sampled = 0
        self.takes = self.uses = self.queues = self.reads = 0

    def packs_to(self, pages: NDArray[np.uint8]) -> float:
        assert len(pages)
        self.sampled += 1
        return self.ratio

    def clock(self) -> int:
        return self.now

    def processor(self) -> int:
        # Asked before looking and after it.
        self.used += self.uses
        self.now += self.takes
        return self.used

    def queued(self) -> int:
        self.waited += self.queues
        return self.waited

    def disk_reads(self) -> int:
        self.sectors += self.reads
        return self.sectors


class Looking:
    """Looks for batches of 64 pages, each of which is then sent for 2 ms."""

    def __init__(self, references: References, clocks: Clocks) -> None:
        self.clocks = clocks
        self.lookup = Lookup(references, clocks.clock, clocks.processor, clocks.queued, clocks.disk_reads)

    def __call__(self, pages: NDArray[np.uint8], batches: int = 1000) -> int:
        """In how many batches was looked."""
        looked = 0
        for _ in range(batches):
            looked += self.lookup.blocks(pages, np.ones(len(pages), dtype=np.bool_), self.clocks) is not None
            self.clocks.now += 2_000_000
        return looked


@pytest.fixture
def agreed(image: Path, tmp_path: Path) -> Iterator[References]:
    references = References([Disk(path=str(image), read_only=True)], tmp_path / "indexes", enabled=True)
    references.make_indexes()
    asked = references.ask()
    with Images([Disk(path=str(image), read_only=True)]) as images:
        references.answered(ImagesSeen([sample(images.files[0], asked.nonce)]))
    yield references
    references.close()


@pytest.fixture
def held(image: Path) -> NDArray[np.uint8]:
    return np.frombuffer(image.read_bytes(), dtype=np.uint8)[3 * PAGE_SIZE :].reshape(-1, PAGE_SIZE)[:64].copy()


OTHER = np.random.default_rng(9).integers(0, 256, (64, PAGE_SIZE), dtype=np.uint8)


@pytest.mark.usefixtures("rests")
def test_looking_for_what_is_not_there_takes_a_twentieth_of_the_time(agreed: References) -> None:
    clocks = Clocks()
    clocks.uses = clocks.takes = 1_000_000
    # Each costs a millisecond, and earns a tenth of one; at first 20 ms are free.
    assert Looking(agreed, clocks)(OTHER) in range(115, 135)


@pytest.mark.usefixtures("rests")
def test_looking_goes_on_while_the_processor_has_time_to_spare(agreed: References) -> None:
    clocks = Clocks(waits=True)
    clocks.uses = clocks.takes = 1_000_000
    assert Looking(agreed, clocks)(OTHER) == 1000


@pytest.mark.usefixtures("rests")
def test_what_is_found_pays_for_looking(agreed: References, held: NDArray[np.uint8]) -> None:
    clocks = Clocks()
    clocks.uses = clocks.takes = 1_000_000
    assert Looking(agreed, clocks)(held) == 1000
    # One in four is enough to know how such pages pack.
    assert clocks.sampled == 250


@pytest.mark.usefixtures("rests")
def test_a_disk_is_waited_for_where_that_takes_less_than_the_wire(agreed: References, held: NDArray[np.uint8]) -> None:
    clocks = Clocks(waits=True)
    clocks.takes, clocks.reads = 900_000, 8
    looking = Looking(agreed, clocks)
    assert looking(held) == 1000
    # What packs well is sent sooner than it is found.
    clocks.ratio = 0.05
    assert looking(held) < 300
    # It is no loss where somebody else has the processor, or nothing is read.
    clocks.queues = 900_000
    assert looking(held) > 900
    clocks.queues = clocks.reads = 0
    assert looking(held) == 1000


@pytest.mark.usefixtures("rests")
def test_a_disk_that_is_slow_over_there_is_waited_for_once(agreed: References, held: NDArray[np.uint8]) -> None:
    looking = Looking(agreed, Clocks(waits=True))
    due = []
    for _ in range(8):
        looking(held, 1)
        due.append(looking.lookup.due)
    assert due == [False] * 7 + [True]
    # As long as the pages would have taken the wire: nothing is lost.
    looking.lookup.asked(0, 512 * 16_000)
    assert looking(held, 64) == 64
    assert looking.lookup.due
    looking.lookup.asked(0, 1_000_000_000)
    assert looking(held, 100) == 0
    # A twentieth of the time pays for it.
    assert looking(held, 10_000) > 0


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch, image: Path) -> None:  # noqa: ARG001  # after what keeps it from resting
    monkeypatch.setattr(references_module, "_AHEAD_NS", 20_000_000)


@pytest.mark.usefixtures("rests")
def test_blocks_are_asked_for_ahead_while_they_come_from_a_disk(agreed: References, held: NDArray[np.uint8]) -> None:
    clocks = Clocks(waits=True)
    looking = Looking(agreed, clocks)
    looking(held, 1)

    def asks() -> int:
        count = 0
        while looking.lookup.cold and count < 100:
            looking.lookup.ask_ahead(held)
            count += 1
        return count

    # At first nobody knows; then the page cache has all.
    assert asks() == 8
    clocks.reads = 8
    looking(held, 1)
    assert asks() == 100
    clocks.reads = 0
    assert asks() == 8
    # Asking takes the processor, too.
    clocks.waits, clocks.uses = False, 50_000_000
    clocks.reads = 8
    looking(OTHER, 1)
    assert not looking.lookup.cold


def test_what_the_guest_stands_still_for_is_not_looked_for() -> None:
    pause = {ranking.QUEUES, ranking.IN_FLIGHT, ranking.STALE_NOW}
    assert pause < ranking.NOT_SOUGHT
    assert ranking.UNCLASSED not in ranking.NOT_SOUGHT
    assert ranking.QUIET_UPTO not in ranking.NOT_SOUGHT
