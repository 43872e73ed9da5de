"""Batches over a real stream: what the packer sends, the unpacker makes pages of again."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.migrate.codec import Compress
from outboard.migrate.outbox import Outbox
from outboard.migrate.packing import Packer
from outboard.migrate.unpacking import Unpacker
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind
from outboard.wire.packed import Form, Packed

PAGES = 4096


class Stream:
    """Both ends of a bulk stream."""

    def __init__(self, compress: Compress) -> None:
        near, far = socket.socketpair()
        for end in (near, far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.near, self.far = Channel(near, "b", PAGES), Channel(far, "a", PAGES)
        self.outbox = Outbox(PAGES)
        self.packer = Packer(self.outbox, self.near, compress)
        self.there = np.zeros((PAGES, 4096), dtype=np.uint8)
        self.unpacker = Unpacker(self)
        self.kinds: list[Kind] = []

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def held(self, page: int, into: memoryview) -> bool:
        """The destination's memory, as the unpacker sees it."""
        into[:] = self.there[page].data
        return bool(self.there[page].any())

    def send(self, runs: list[tuple[int, int]], pages: NDArray[np.uint8], *, changes: bool = False) -> None:
        """Send, receive and place."""
        self.packer.begin()
        self.packer.send(runs, pages.reshape(-1), (pages == 0).all(axis=1), changes=changes)
        frame = self.far.receive(5)
        self.kinds.append(frame.kind)
        got = self.far.pages(frame) if frame.kind is Kind.PAGES else self.unpacker.pages(self.far.packed(frame))
        assert got.runs == runs
        numbers = np.array([page for first, count in runs for page in range(first, first + count)])
        self.there[numbers[got.zero]] = 0
        self.there[numbers[~got.zero]] = np.frombuffer(got.data, dtype=np.uint8).reshape(-1, 4096)
        assert np.array_equal(self.there[numbers], pages)


@pytest.fixture(params=[Compress.LZ4, Compress.ZSTD, Compress.NONE])
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    made = Stream(request.param)
    yield made
    made.close()


def text(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 4, (count, 4096), dtype=np.uint8)


def test_pages_arrive_as_they_were(stream: Stream) -> None:
    pages = text(64, 1)
    pages[::3] = 0
    stream.send([(10, 30), (100, 34)], pages)
    stream.send([(0, 1)], np.zeros((1, 4096), dtype=np.uint8))
    stream.send([(500, 64)], np.random.default_rng(2).integers(0, 256, (64, 4096), dtype=np.uint8))
    sent = stream.outbox.statistics()
    assert (sent.data_pages, sent.zero_pages) == (42 + 64, 22 + 1)
    assert sent.bulk_bytes == stream.packer.octets
    assert stream.packer.content_bytes == 4096 * (42 + 64)
    assert sum(sent.content.codec_pages) == 42 + 64
    assert sent.content.same_pages == sent.content.changed_pages == 0
    if stream.packer.choice.enabled:
        assert stream.kinds == [Kind.PACKED, Kind.PAGES, Kind.PACKED]
        assert sent.content.codec_pages[0] == 64, "noise went packed"
        assert 64 * 4096 < sent.content.packed_bytes < (64 + 30) * 4096
        assert sent.content.codec_ns > 0
    else:
        assert set(stream.kinds) == {Kind.PAGES}
        assert sent.content.packed_bytes == 4096 * (42 + 64)
        assert sent.content.codec_ns == 0


@pytest.fixture
def packed() -> Iterator[Stream]:
    made = Stream(Compress.LZ4)
    yield made
    made.close()


def noise(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 4096), dtype=np.uint8)


def test_a_page_that_was_sent_goes_as_a_reference(packed: Stream) -> None:
    pages = noise(64, 3)
    pages[40] = pages[7]
    packed.send([(0, 64)], pages)
    assert packed.outbox.statistics().content.same_pages == 1
    before = packed.packer.octets
    packed.send([(1000, 64)], pages[::-1].copy())
    sent = packed.outbox.statistics()
    assert sent.content.same_pages == 65
    assert packed.packer.octets - before < 64 * 16
    assert sent.data_pages == 128
    assert sum(sent.content.codec_pages) == 63


def test_pages_are_not_looked_up_where_that_finds_none(packed: Stream) -> None:
    for batch in range(16):
        packed.send([(64 * batch, 64)], noise(64, batch))
    assert set(packed.kinds) == {Kind.PACKED}
    packed.send([(2000, 64)], noise(64, 5))
    assert packed.kinds[-1] is Kind.PAGES
    assert packed.outbox.statistics().content.same_pages == 0


def test_what_has_changed_of_a_page_is_enough(packed: Stream) -> None:
    pages = noise(64, 3)
    packed.send([(5, 64)], pages, changes=True)
    before = packed.packer.octets
    pages[::2, 100:108] ^= 255
    pages[1::4] = noise(16, 4)
    packed.send([(5, 64)], pages, changes=True)
    sent = packed.outbox.statistics().content
    assert (sent.changed_pages, sent.same_pages) == (48, 0)
    assert packed.packer.octets - before < 16 * 4096 + 32 * 60 + 16 * 20 + 500


def test_pages_of_zeros_have_no_changes(packed: Stream) -> None:
    pages = noise(4, 3)
    packed.send([(5, 4)], pages, changes=True)
    pages[2] = 0
    packed.send([(5, 4)], pages, changes=True)
    pages[2] = noise(1, 5)
    packed.send([(5, 4)], pages, changes=True)
    assert packed.outbox.statistics().content.changed_pages == 6


def test_nothing_is_known_of_what_went_while_the_guest_ran(packed: Stream) -> None:
    pages = noise(4, 3)
    packed.send([(5, 4)], pages, changes=True)
    packed.send([(5, 4)], noise(4, 4))
    pages[:, 0] ^= 1
    packed.send([(5, 4)], pages, changes=True)
    assert packed.outbox.statistics().content.changed_pages == 0


def test_nothing_is_looked_for_where_the_user_wants_nothing(stream: Stream) -> None:
    pages = noise(8, 3)
    for _ in range(2):
        stream.send([(5, 8)], pages, changes=True)
    told = stream.outbox.statistics().content
    assert (told.same_pages + told.changed_pages == 8) == stream.packer.choice.enabled


NO_CONTENT: NDArray[np.uint8] = np.empty((0, 4096), dtype=np.uint8)


@pytest.mark.parametrize("form", [Form.SAME, Form.CHANGED])
def test_a_frame_that_relies_on_what_is_not_here_is_refused(packed: Stream, form: Form) -> None:
    changes = np.ones((1 if form is Form.CHANGED else 0, 4096), dtype=np.uint8)
    slots = np.zeros(1 if form is Form.SAME else 0, dtype=np.uint16)
    frame = Packed([(3, 1)], np.array([form], dtype=np.uint8), slots, NO_CONTENT, changes)
    with pytest.raises(PeerError, match="PACKED"):
        packed.unpacker.pages(frame)
