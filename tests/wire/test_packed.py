"""PACKED frames: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.wire.codecs import CODERS, LZ4, NONE, Coder
from outboard.wire.frames import HEADER_SIZE, Kind, read_header
from outboard.wire.packed import SLOTS, Form, decode_packed, packed_frame

LIMIT = 1000
NO_SLOTS = np.empty(0, dtype=np.uint16)
NO_PAGES = np.empty((0, 4096), dtype=np.uint8)
NO_BLOCKS = np.empty((0, 2), dtype=np.uint64)


def content_of(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, (count, 4096), dtype=np.uint8)


def payload_of(
    runs: list[tuple[int, int]],
    forms: list[int],
    slots: NDArray[np.uint16] = NO_SLOTS,
    content: NDArray[np.uint8] = NO_PAGES,
    changes: NDArray[np.uint8] = NO_PAGES,
    coder: Coder = LZ4,
    blocks: NDArray[np.uint64] = NO_BLOCKS,
) -> memoryview:
    coder = coder if content.size else NONE
    pieces = packed_frame(
        runs,
        np.array(forms, dtype=np.uint8),
        slots,
        coder.codec,
        coder.pack(content.reshape(-1).data),
        LZ4.pack(changes.reshape(-1).data) if changes.size else b"",
        blocks.astype("<u8").tobytes(),
    )
    raw = memoryview(b"".join(pieces))
    kind, length = read_header(raw[:HEADER_SIZE])
    assert kind is Kind.PACKED
    assert length == len(raw) - HEADER_SIZE
    return raw[HEADER_SIZE:]


@given(st.lists(st.sampled_from(Form), min_size=1, max_size=12), st.sampled_from(CODERS), st.integers(0, 2**30))
def test_a_frame_is_read_as_it_was_made(forms: list[Form], coder: Coder, seed: int) -> None:
    count = len(forms)
    runs = [(seed % 500, count - count // 2)] + ([(700, count // 2)] if count > 1 else [])
    slots = np.arange(sum(form in (Form.KEPT, Form.SAME) for form in forms), dtype=np.uint16)
    content = content_of(sum(form in (Form.FULL, Form.KEPT) for form in forms), seed)
    changes = content_of(sum(form is Form.CHANGED for form in forms), seed + 1)
    blocks = np.random.default_rng(seed).integers(0, 1 << 64, (forms.count(Form.BLOCK), 2), dtype=np.uint64)
    payload = payload_of(runs, [int(form) for form in forms], slots, content, changes, coder, blocks)
    read = decode_packed(payload, LIMIT)
    assert read.runs == runs
    assert read.forms.tolist() == forms
    assert np.array_equal(read.slots, slots)
    assert np.array_equal(read.content, content)
    assert np.array_equal(read.changes, changes)
    assert np.array_equal(read.blocks, blocks)


def changed(payload: memoryview, at: int, value: int, size: str = "<I") -> memoryview:
    copy = bytearray(payload)
    struct.pack_into(size, copy, at, value)
    return memoryview(copy)


GOOD = payload_of(
    [(5, 3)],
    [Form.KEPT, Form.SAME, Form.CHANGED],
    np.array([7, 7], dtype=np.uint16),
    content_of(1, 1),
    content_of(1, 2),
)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (changed(GOOD, 8, 9), "codec 9"),
        (changed(GOOD, 12, 1 << 31), "before its content"),
        (changed(GOOD, 12, 3), "cannot be unpacked"),
        (changed(GOOD, 4, 4), "add up"),
        (changed(GOOD, 16, LIMIT), "beyond the guest"),
        (changed(GOOD, 32, 6, "<B"), "form 6"),
        (changed(GOOD, 32, Form.ZERO, "<B"), "bytes of LZ4"),
        (changed(GOOD, 34, Form.ZERO, "<B"), "behind its content"),
        (changed(GOOD, 35, SLOTS, "<H"), f"slot {SLOTS}"),
        (memoryview(bytes(GOOD) + b"x"), "cannot be unpacked"),
        (GOOD[:-1], "cannot be unpacked"),
        (GOOD[:33], "before its forms"),
        (GOOD[:20], "before its runs"),
        (GOOD[:8], "before its counts"),
    ],
)
def test_what_does_not_add_up_is_refused(payload: memoryview, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        decode_packed(payload, LIMIT)


def test_content_as_it_is_needs_no_copy() -> None:
    content = content_of(2, 3)
    payload = payload_of([(0, 2)], [Form.FULL, Form.FULL], content=content, coder=NONE)
    assert np.shares_memory(decode_packed(payload, LIMIT).content, np.frombuffer(payload, dtype=np.uint8))
