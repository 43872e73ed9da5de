"""Codecs: bytes to fewer bytes and back, LZ4 blocks and Zstandard frames.

What is unpacked was packed by a peer, who may lie. Its size is known beforehand from what it stands for, so nothing is
allocated by a number of the peer's, and anything that does not come out at that size is refused.

Source: LZ4 block format; RFC 8878.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import lz4.block
import zstandard

from outboard.errors import PeerError

Octets: TypeAlias = bytes | memoryview


class Codec(IntEnum):
    """How bytes are packed, as it is said on the wire."""

    NONE = 0
    LZ4 = 1
    ZSTD = 2


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """A way to pack: a codec, and how much it tries.

    :ivar name: for people.
    """

    name: str
    codec: Codec
    pack: Callable[[Octets], Octets]


def _lz4(data: Octets) -> Octets:
    packed: bytes = lz4.block.compress(data, store_size=False)
    return packed


def _zstd(level: int) -> Coder:
    return Coder(f"zstd-{level}", Codec.ZSTD, zstandard.ZstdCompressor(level=level).compress)


NONE = Coder("none", Codec.NONE, lambda data: data)
LZ4 = Coder("lz4", Codec.LZ4, _lz4)
ZSTD = tuple(_zstd(level) for level in (1, 2, 3))
CODERS = (NONE, LZ4, *ZSTD)
"""All of them, those that take less processor time first."""

_MOST = 2 << 20
"""Bytes that are packed at a time, and so the window that a Zstandard frame may ask for."""
_unzstd = zstandard.ZstdDecompressor(max_window_size=_MOST)


def unpack(codec: Codec, data: memoryview, size: int) -> Octets:
    """Unpack what must come out as ``size`` bytes, at most 2 MiB.

    :raise PeerError: it does not.
    """
    try:
        unpacked = _unpack(codec, data, size)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        raise PeerError(f"{len(data)} bytes of {codec.name} cannot be unpacked: {error}") from error
    if len(unpacked) != size:
        raise PeerError(f"{len(data)} bytes of {codec.name} hold {len(unpacked)} bytes where {size} are due")
    return unpacked


def _unpack(codec: Codec, data: memoryview, size: int) -> Octets:
    if codec is Codec.NONE or not size:
        return data
    if codec is Codec.LZ4:
        unpacked: bytes = lz4.block.decompress(data, uncompressed_size=size)
        return unpacked
    # Of a frame that says how much it holds, the library allocates that much.
    told = zstandard.frame_content_size(data)
    if told != size:
        raise PeerError(f"a Zstandard frame announces {told} bytes where {size} are due")
    return _unzstd.decompress(data, max_output_size=size, allow_extra_data=False)
