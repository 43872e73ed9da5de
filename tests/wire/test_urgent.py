"""The two ends of the urgent stream: the usual frame, every other frame, and what is none."""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from outboard.errors import PeerError, UnreachableError
from outboard.wire import frames
from outboard.wire.channel import Channel
from outboard.wire.frames import PAGE, Kind
from outboard.wire.urgent import Answering, Asking

PAGES = 1000


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    with Channel(left, "destination", PAGES) as ours, Channel(right, "source", PAGES) as theirs:
        yield ours, theirs


def content(address: int | None) -> bytes | None:
    return None if address is None else ctypes.string_at(address, PAGE)


def taken(asking: Asking) -> list[tuple[int, bytes | None]]:
    """What has come, read while it is good."""
    return [(page, content(address)) for page, address in asking.answers()]


def full(number: int) -> bytes:
    return bytes([number % 255 + 1]) * PAGE


def answer(answering: Answering, page: int, data: bytes) -> None:
    answering.page[:] = data
    answering.answer(page)


def test_a_page_is_asked_for_and_answered(ends: tuple[Channel, Channel]) -> None:
    asking, answering = Asking(ends[0]), Answering(ends[1])
    for page in (0, 7, PAGES - 1):
        asking.ask([page])
        assert answering.requests() == (page,)
        answer(answering, page, full(page))
        assert taken(asking) == [(page, full(page))]


def test_a_page_of_zeros_travels_without_them(ends: tuple[Channel, Channel]) -> None:
    asking, answering = Asking(ends[0]), Answering(ends[1])
    answering.page[:] = bytes(PAGE)
    assert answering.answer(3) < 100
    assert taken(asking) == [(3, None)]
    # All zeros but the last byte: no page of zeros.
    nearly = bytes(PAGE - 1) + b"x"
    answer(answering, 4, nearly)
    assert taken(asking) == [(4, nearly)]


def test_several_pages_at_once(ends: tuple[Channel, Channel]) -> None:
    asking, answering = Asking(ends[0]), Answering(ends[1])
    asking.ask([5, 6, 900])
    assert answering.requests() == (5, 6, 900)
    asking.ask([1])
    asking.ask([2])
    assert answering.requests() == (1,)
    assert answering.requests() == (2,)


def test_answers_that_came_together_are_all_taken(ends: tuple[Channel, Channel]) -> None:
    asking, answering = Asking(ends[0]), Answering(ends[1])
    for page in (8, 9, 10):
        answer(answering, page, full(page))
    got: list[tuple[int, bytes | None]] = []
    while len(got) < 3:
        got += taken(asking)
    assert got == [(page, full(page)) for page in (8, 9, 10)]


def test_an_answer_in_pieces_is_waited_for(ends: tuple[Channel, Channel]) -> None:
    asking = Asking(ends[0])
    frame = frames.pages_head([(12, 1)], np.zeros(1, dtype=np.bool_)) + full(12)
    for cut in (1, 16, 30, 100, len(frame) - 1):
        sender = threading.Timer(0.05, ends[1].socket.sendall, [frame[cut:]])
        ends[1].socket.sendall(frame[:cut])
        sender.start()
        assert taken(asking) == [(12, full(12))]
        sender.join()


def test_an_answer_of_many_pages(ends: tuple[Channel, Channel]) -> None:
    zero = np.array([False, True, False])
    ends[1].send_pages([(20, 2), (40, 1)], zero, memoryview(full(20) + full(40)))
    assert taken(Asking(ends[0])) == [(20, full(20)), (21, None), (40, full(40))]


def test_an_answer_beyond_the_guest_is_refused(ends: tuple[Channel, Channel]) -> None:
    answer(Answering(ends[1]), PAGES, full(1))
    with pytest.raises(PeerError, match="beyond the guest's 1000"):
        taken(Asking(ends[0]))


def test_an_answer_that_is_none(ends: tuple[Channel, Channel]) -> None:
    ends[1].send_message(b"not a page")
    with pytest.raises(PeerError, match="came as MESSAGE"):
        taken(Asking(ends[0]))


def test_a_request_beyond_the_guest_is_refused(ends: tuple[Channel, Channel]) -> None:
    Asking(ends[0]).ask([PAGES])
    with pytest.raises(PeerError, match="beyond the guest's 1000"):
        Answering(ends[1]).requests()


def test_a_request_that_is_none(ends: tuple[Channel, Channel]) -> None:
    ends[0].send_message(b"12345678")
    with pytest.raises(PeerError, match="came as MESSAGE"):
        Answering(ends[1]).requests()


def test_garbage_of_a_requests_size(ends: tuple[Channel, Channel]) -> None:
    ends[0].socket.sendall(bytes(len(frames.header(Kind.REQUEST, 8)) + 8))
    with pytest.raises(PeerError, match="does not speak"):
        Answering(ends[1]).requests()


def test_a_peer_that_is_gone(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    with pytest.raises(UnreachableError, match="gone"):
        Answering(ends[1]).requests()


def test_an_asker_whose_peer_is_gone(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    with pytest.raises(UnreachableError, match="gone"):
        taken(Asking(ends[0]))
