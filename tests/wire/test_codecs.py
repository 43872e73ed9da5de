"""Packing and unpacking: what comes out is what went in, at the size that is due, or PeerError."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import PeerError
from outboard.wire.codecs import CODERS, LZ4, NONE, ZSTD, Codec, Coder, unpack

packers = pytest.mark.parametrize("coder", CODERS[1:], ids=lambda coder: coder.name)


@given(st.sampled_from(CODERS), st.binary(min_size=1, max_size=500), st.integers(1, 40))
def test_what_is_packed_comes_out_again(coder: Coder, piece: bytes, times: int) -> None:
    data = piece * times
    assert bytes(unpack(coder.codec, memoryview(coder.pack(data)), len(data))) == data


@packers
def test_what_repeats_becomes_less(coder: Coder) -> None:
    assert len(coder.pack(b"page" * 1024)) < 100


@given(st.sampled_from(Codec), st.binary(max_size=200), st.integers(0, 1 << 20))
def test_no_bytes_come_out_at_another_size(codec: Codec, data: bytes, size: int) -> None:
    try:
        unpacked = unpack(codec, memoryview(data), size)
    except PeerError:
        return
    assert len(unpacked) == size


@packers
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"more", lambda _: b""])
def test_what_is_damaged_is_refused(coder: Coder, change: object) -> None:
    assert callable(change)
    packed = change(bytes(coder.pack(b"page" * 1024)))
    with pytest.raises(PeerError):
        unpack(coder.codec, memoryview(packed), 4096)


@pytest.mark.parametrize("coder", CODERS, ids=lambda coder: coder.name)
@pytest.mark.parametrize("size", [4095, 4097, 0, 1 << 20])
def test_another_size_than_is_due_is_refused(coder: Coder, size: int) -> None:
    packed = memoryview(coder.pack(b"page" * 1024))
    with pytest.raises(PeerError):
        unpack(coder.codec, packed, size)


def test_nothing_is_allocated_by_a_number_of_the_peers() -> None:
    # 256 MiB of zeros in a few bytes.
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    with pytest.raises(PeerError, match="announces 268435456 bytes where 4096 are due"):
        unpack(Codec.ZSTD, memoryview(bomb), 4096)
    # A window of 128 MiB for a page, and the frame not whole: it would have to be kept.
    wide = b"\x28\xb5\x2f\xfd\x40\x88" + (4096 - 256).to_bytes(2, "little")
    assert zstandard.get_frame_parameters(wide).window_size == 128 << 20
    with pytest.raises(PeerError):
        unpack(Codec.ZSTD, memoryview(wide), 4096)
    with pytest.raises(PeerError):
        unpack(Codec.LZ4, memoryview(LZ4.pack(bytes(1 << 20))), 4096)


def test_the_cheap_come_first() -> None:
    assert (NONE, LZ4, *ZSTD) == CODERS
    assert [coder.name for coder in CODERS] == ["none", "lz4", "zstd-1", "zstd-2", "zstd-3"]
