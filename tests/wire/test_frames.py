"""Frames go round trip in any slicing; whatever is damaged, oversized or lies is refused before it is used."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import PeerError
from outboard.wire import frames
from outboard.wire.frames import Decoder, Kind

LIMIT = 1000
run_lists = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 40)), min_size=1, max_size=6)


def fed(decoder: Decoder, stream: bytes, step: int) -> list[tuple[Kind, bytes]]:
    """Feed a stream in pieces of ``step`` bytes; the frames that came out."""
    found = []
    for at in range(0, len(stream), step):
        piece = stream[at : at + step]
        decoder.get_buffer()[: len(piece)] = piece
        decoder.buffer_updated(len(piece))
        while (frame := decoder.next()) is not None:
            found.append((frame.kind, bytes(frame.payload)))
    return found


@given(
    st.lists(st.tuples(st.sampled_from([Kind.MESSAGE, Kind.STREAM]), st.binary(max_size=300)), max_size=8),
    st.integers(1, 200),
)
def test_any_slicing_of_the_stream_gives_the_same_frames(sent: list[tuple[Kind, bytes]], step: int) -> None:
    stream = b"".join(frames.header(kind, len(body)) + body for kind, body in sent)
    decoder = Decoder()
    assert fed(decoder, stream, step) == sent
    assert not decoder.partial


def test_hundreds_of_megabytes_pass_through_one_buffer() -> None:
    body = bytes(range(256)) * 1024
    decoder = Decoder()
    stream = frames.header(Kind.STREAM, len(body)) + body
    for _ in range(100):
        assert fed(decoder, stream, 100_000) == [(Kind.STREAM, body)]


@given(run_lists)
def test_pages_go_round_trip(runs: list[tuple[int, int]]) -> None:
    total = sum(count for _, count in runs)
    zero = np.random.default_rng(total).integers(0, 2, total).astype(np.bool_)
    data = np.random.default_rng(1).integers(0, 256, int((~zero).sum()) * 4096, dtype=np.uint8).tobytes()
    head = frames.pages_head(runs, zero)
    kind, length = frames.read_header(memoryview(head)[:16])
    assert (kind, length) == (Kind.PAGES, len(head) - 16 + len(data))
    pages = frames.decode_pages(memoryview(head[16:] + data), LIMIT)
    assert pages.runs == runs
    assert pages.zero.tolist() == zero.tolist()
    assert bytes(pages.data) == data


def payload(runs: list[tuple[int, int]], pages: int, data: int, run_count: int | None = None) -> memoryview:
    words = struct.pack(f"<{2 * len(runs)}Q", *(word for run in runs for word in run))
    head = struct.pack("<II", len(runs) if run_count is None else run_count, pages)
    return memoryview(head + words + bytes((pages + 7) // 8) + bytes(4096 * data))


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(memoryview(b""), id="empty"),
        pytest.param(payload([(0, 1)], 1, 0), id="data missing"),
        pytest.param(payload([(0, 1)], 1, 2), id="data too long"),
        pytest.param(payload([(0, 2)], 1, 1), id="runs longer than the count"),
        pytest.param(payload([(0, 1)], 2, 2), id="runs shorter than the count"),
        pytest.param(payload([(LIMIT, 1)], 1, 1), id="first page beyond"),
        pytest.param(payload([(LIMIT - 1, 2)], 2, 2), id="last page beyond"),
        pytest.param(payload([(2**64 - 1, 1)], 1, 1), id="wraps"),
        pytest.param(payload([(0, 2**64 - 1), (0, 2)], 1, 1), id="counts wrap"),
        pytest.param(payload([(0, 0), (0, 1)], 1, 1), id="an empty run"),
        pytest.param(payload([], 0, 0), id="no pages"),
        pytest.param(payload([(0, 1)], 1, 1, run_count=2**32 - 1), id="runs that are not there"),
        pytest.param(payload([(0, frames.MAX_PAGES + 1)], frames.MAX_PAGES + 1, 0), id="too many"),
    ],
)
def test_pages_that_lie_are_refused(lie: memoryview) -> None:
    with pytest.raises(PeerError):
        frames.decode_pages(lie, LIMIT)


@pytest.mark.parametrize(
    "lie", [b"", bytes(7), struct.pack("<Q", LIMIT), struct.pack("<Q", 2**64 - 1), bytes(8 * (frames.MAX_REQUEST + 1))]
)
def test_requests_that_lie_are_refused(lie: bytes) -> None:
    with pytest.raises(PeerError):
        frames.decode_request(memoryview(lie), LIMIT)


def test_requests_go_round_trip() -> None:
    assert frames.decode_request(memoryview(struct.pack("<3Q", 5, 0, LIMIT - 1)), LIMIT) == (5, 0, LIMIT - 1)


@pytest.mark.parametrize(
    ("first", "bits"), [(4, b"\0"), (LIMIT + 8, b""), (0, bytes(126)), (992, b"\0\0"), (LIMIT // 8 * 8 + 2**40, b"\0")]
)
def test_page_sets_that_lie_are_refused(first: int, bits: bytes) -> None:
    with pytest.raises(PeerError):
        frames.decode_pageset(memoryview(frames.pageset_head(1, first) + bits), LIMIT)


def test_a_page_set_with_bits_beyond_the_last_page_is_refused() -> None:
    assert frames.decode_pageset(memoryview(frames.pageset_head(1, 0) + b"\x0f"), 4).bits.tolist() == [15]
    with pytest.raises(PeerError):
        frames.decode_pageset(memoryview(frames.pageset_head(1, 0) + b"\x10"), 4)


def damaged(**changes: int) -> bytes:
    fields = {"version": 1, "kind": 1, "flags": 0, "length": 0} | changes
    head = struct.pack("<4sBBHI", b"OBRD", fields["version"], fields["kind"], fields["flags"], fields["length"])
    return head + struct.pack("<I", zlib.crc32(head))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"GET / HTTP/1.1\r\n", "does not speak"),
        (damaged(version=2), "version 2"),
        (damaged(kind=99), "unknown kind 99"),
        (damaged(flags=1), "damaged"),
        (damaged(length=frames.MAX_PAYLOAD + 1), "is the most"),
        (damaged()[:12] + b"\0\0\0\0", "damaged"),
    ],
)
def test_what_is_no_header_breaks_the_stream_for_good(raw: bytes, words: str) -> None:
    decoder = Decoder()
    for _ in range(2):
        with pytest.raises(PeerError, match=words):
            fed(decoder, raw, 16)


def test_a_truncated_frame_is_waited_for() -> None:
    decoder = Decoder()
    assert fed(decoder, frames.header(Kind.MESSAGE, 10) + b"12345", 3) == []
    assert decoder.partial
