"""The source's senders, from a process's memory over a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from outboard.migrate.outbox import Outbox, Share
from outboard.migrate.sending import Answerer, BulkSender, Send, decode_done, encode_order
from outboard.migrate.turns import NEVER
from outboard.migrate.worker import Worker
from outboard.pages.pageset import PageSet
from outboard.vmm.guest import Guest
from outboard.wire.channel import Channel
from outboard.wire.frames import Pages
from outboard.wire.urgent import Asking
from tests.support.process_guest import guest_of
from tests.support.target import Target


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Target(mebibytes=8) as target:
        guest = guest_of(target)
        for page in range(target.pages):
            guest.memory.write(page, memoryview(bytes([0 if page % 2 else page % 255 + 1]) * 4096))
        yield guest
        guest.memory.close()


class Peer:
    """The other end of a sender's channel, over TCP: the bulk asks the kernel for the connection's state."""

    def __init__(self, guest: Guest) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
        self.channel = Channel(left, "destination", guest.pages)
        self.far = Channel(right, "source", guest.pages)

    def close(self) -> None:
        self.channel.close()
        self.far.close()

    def pages(self) -> list[int]:
        """The page numbers of the next frame; its content is checked: even pages hold their number, odd ones zeros."""
        pages: Pages = self.far.pages(self.far.receive(5))
        numbers = [page for first, count in pages.runs for page in range(first, first + count)]
        assert pages.zero.tolist() == [page % 2 == 1 for page in numbers]
        content = np.frombuffer(pages.data, dtype=np.uint8).reshape(-1, 4096)
        for row, page in zip(content, [page for page in numbers if page % 2 == 0], strict=True):
            assert np.all(row == page % 255 + 1)
        return numbers


@pytest.fixture
def peer(guest: Guest) -> Iterator[Peer]:
    made = Peer(guest)
    yield made
    made.close()


def ranked(guest: Guest, **ranks: tuple[int, int]) -> Outbox:
    outbox = Outbox(guest.pages)
    for name, (first, count) in ranks.items():
        outbox.rank[first : first + count] = int(name[1:])
    return outbox


def bulk(guest: Guest, outbox: Outbox, peer: Peer) -> Worker:
    return Worker("test-bulk", lambda link: BulkSender(guest, outbox, peer.channel, link).serve())


def done(worker: Worker) -> bool:
    report = worker.hear(5)
    assert report is not None
    return decode_done.decode(report).complete


def test_what_is_due_goes_by_rank_once(guest: Guest, peer: Peer) -> None:
    outbox = ranked(guest, r7=(0, 10), r3=(100, 5), r9=(500, 4))
    outbox.sent[101] = 1
    worker = bulk(guest, outbox, peer)
    worker.tell(encode_order(Send(0, guest.pages, 7, paced=False)))
    assert peer.pages() == [100, 102, 103, 104]
    assert peer.pages() == list(range(10))
    assert done(worker)
    worker.tell(encode_order(Send(0, guest.pages, 7, paced=True)))
    assert done(worker)
    assert outbox.statistics().data_pages == 3 + 5
    assert outbox.unsent() == PageSet.from_numbers(guest.pages, np.arange(500, 504))
    worker.end()


def test_two_streams_send_their_shares_and_help_each_other_once_order_does_not_count(guest: Guest, peer: Peer) -> None:
    outbox = ranked(guest, r7=(0, 1024))
    second = Peer(guest)
    workers = [
        Worker(
            "test-bulk",
            lambda link, number=number, channel=each.channel: BulkSender(  # type: ignore[misc]
                guest, outbox, channel, link, share=Share(number, 2)
            ).serve(),
        )
        for number, each in enumerate((peer, second))
    ]
    # The second stream has nothing of the first chunk, and so nothing to do before the resume.
    before = Send(0, 512, 7, paced=False, changes=True)
    workers[1].tell(encode_order(before))
    assert done(workers[1])
    assert not outbox.already_sent()
    workers[1].tell(encode_order(Send(0, 1024, 7, paced=False, changes=True)))
    assert [page for _ in range(8) for page in second.pages()] == list(range(512, 1024))
    assert done(workers[1])
    workers[1].tell(encode_order(Send(0, 1024, 7, paced=False)))
    assert [page for _ in range(8) for page in second.pages()] == list(range(512))
    assert done(workers[1])
    workers[0].tell(encode_order(before))
    assert done(workers[0])
    assert outbox.statistics().data_pages == 512
    for worker in workers:
        worker.end()
    second.close()


def test_what_only_fills_the_link_stops_when_it_is_told(guest: Guest, peer: Peer) -> None:
    outbox = ranked(guest, r5=(0, 64))
    outbox.halted = True
    worker = bulk(guest, outbox, peer)
    worker.tell(encode_order(Send(0, guest.pages, 9, paced=True, haltable=True)))
    assert not done(worker)
    assert len(outbox.unsent()) == 64
    worker.tell(encode_order(Send(0, guest.pages, 9, paced=True)))
    assert done(worker)
    assert peer.pages() == list(range(64))
    worker.end()


def test_time_that_is_up_leaves_the_rest(guest: Guest, peer: Peer) -> None:
    outbox = ranked(guest, r5=(0, 640))
    worker = bulk(guest, outbox, peer)
    worker.tell(encode_order(Send(0, guest.pages, 9, paced=True, seconds=0.0)))
    assert not done(worker)
    assert len(outbox.unsent()) == 640 - 64
    worker.end()


def test_large_pages_go_in_one_frame_without_what_is_free(guest: Guest, peer: Peer) -> None:
    outbox = Outbox(guest.pages, unit=512, digested=True)
    outbox.rank[512:1024] = 5
    outbox.rank[512:520] = 3
    outbox.rank[600:700] = NEVER
    worker = bulk(guest, outbox, peer)
    worker.tell(encode_order(Send(0, guest.pages, 4, paced=False)))
    pages = peer.far.pages(peer.far.receive(5))
    assert pages.runs == [(512, 512)]
    assert pages.zero.tolist() == [page % 2 == 1 or 600 <= page < 700 for page in range(512, 1024)]
    assert done(worker)
    assert outbox.already_sent() == PageSet.from_runs(guest.pages, np.array([[512, 512]]))
    assert outbox.digests is not None
    assert outbox.digests[602] == outbox.digests[513] != outbox.digests[512]
    worker.end()


def test_a_fault_on_a_large_page_is_answered_with_all_of_it(guest: Guest, peer: Peer) -> None:
    outbox = Outbox(guest.pages, unit=512)
    answerer = Worker("test-answer", lambda _: Answerer(guest, outbox, peer.channel).serve(), urgent=True)
    asking = Asking(peer.far)
    asking.ask([512])
    asking.ask([515])
    asking.ask([0])
    for first in (512, 0):
        runs, zero, content = next(asking.frames())
        assert runs.tolist() == [[first, 512]]
        assert zero.tolist() == [page % 2 == 1 for page in range(512)]
        assert content[0] == first % 255 + 1
    assert outbox.statistics().urgent_pages == 1024
    answerer.end()


def test_a_fault_is_answered_once_and_the_bulk_passes_over_it(guest: Guest, peer: Peer) -> None:
    outbox = ranked(guest, r5=(10, 3))
    answerer = Worker("test-answer", lambda _: Answerer(guest, outbox, peer.channel).serve(), urgent=True)
    asking = Asking(peer.far)
    for page in (12, 12, 11):
        asking.ask([page])
    got: list[tuple[int, bool]] = []
    while len(got) < 2:
        got += [(page, address is None) for page, address in asking.answers()]
    assert got == [(12, False), (11, True)]
    assert outbox.statistics().urgent_pages == 2
    assert outbox.unsent() == PageSet.from_numbers(guest.pages, np.array([10]))
    answerer.end()
