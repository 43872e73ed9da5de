"""Hostile bytes: the decoder and every payload reader either accept what is within the limits or raise PeerError."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outboard.errors import PeerError
from outboard.wire import frames
from outboard.wire.codecs import LZ4
from outboard.wire.frames import Decoder, Kind
from outboard.wire.packed import SLOTS, Form, decode_packed, packed_frame

LIMIT = 100


def read(frame: frames.Frame) -> None:
    if frame.kind is Kind.PAGES:
        pages = frames.decode_pages(frame.payload, LIMIT)
        assert all(first >= 0 and count > 0 and first + count <= LIMIT for first, count in pages.runs)
        assert len(pages.data) == 4096 * int((~pages.zero).sum())
    elif frame.kind is Kind.PACKED:
        packed = decode_packed(frame.payload, LIMIT)
        assert all(first >= 0 and count > 0 and first + count <= LIMIT for first, count in packed.runs)
        assert len(packed.forms) == sum(count for _, count in packed.runs)
        assert all(slot < SLOTS for slot in packed.slots)
    elif frame.kind is Kind.REQUEST:
        assert all(0 <= page < LIMIT for page in frames.decode_request(frame.payload, LIMIT))
    elif frame.kind is Kind.PAGESET:
        part = frames.decode_pageset(frame.payload, LIMIT)
        assert part.first // 8 + part.bits.size <= (LIMIT + 7) // 8


@settings(max_examples=400)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=300)).map(
                lambda pair: frames.header(pair[0], len(pair[1])) + pair[1]
            ),
        ),
        max_size=6,
    )
)
@example([frames.header(Kind.PAGES, 8) + b"\xff" * 8])
@example([frames.header(Kind.PACKED, 16) + b"\xff" * 16])
def test_no_bytes_get_past_the_limits(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        decoder.get_buffer()[: len(piece)] = piece
        decoder.buffer_updated(len(piece))
        try:
            while (frame := decoder.next()) is not None:
                read(frame)
        except PeerError:
            return


GOOD = b"".join(
    bytes(piece)
    for piece in packed_frame(
        [(3, 2), (9, 3)],
        np.array([Form.KEPT, Form.SAME, Form.CHANGED, Form.FULL, Form.BLOCK], dtype=np.uint8),
        np.array([7, 7], dtype=np.uint16),
        LZ4.codec,
        LZ4.pack(bytes(range(256)) * 32),
        LZ4.pack(b"\1" * 4096),
        bytes(range(16)),
    )
)


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(frames.HEADER_SIZE, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(frames.HEADER_SIZE, len(GOOD)),
)
def test_no_damage_to_packed_pages_gets_past_the_limits(damage: list[tuple[int, int]], end: int) -> None:
    raw = bytearray(GOOD)
    for at, octet in damage:
        raw[at] = octet
    try:
        read(frames.Frame(Kind.PACKED, memoryview(raw)[frames.HEADER_SIZE : end]))
    except PeerError:
        return
