"""Frames, without I/O.

A frame is a header of 16 bytes and a payload, little endian::

    magic "OBRD" | version u8 = 1 | kind u8 | flags u16 = 0 | length u32 | CRC-32 of the 12 bytes before

The length is of the payload, at most MAX_PAYLOAD. Payloads:

MESSAGE   bytes of a control message
PAGES     runs u32, pages u32, then for each run its first page u64 and count u64, then a bit a page (1: all zeros, no
          data), then 4096 bytes for each page that is not zero, in order; at most MAX_PAGES pages
REQUEST   page numbers u64, at most MAX_REQUEST
PAGESET   name u32, u32 = 0, first page u64 (a multiple of 8), then a bit a page
STREAM    raw bytes; none end the stream
PACKED    pages in fewer bytes; see :mod:`outboard.wire.packed`

Whatever a peer sends is checked before it is used: lengths against the caps, page numbers against the guest's size.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError

MAGIC = b"OBRD"
VERSION = 1
MAX_PAYLOAD = 4 << 20
MAX_PAGES = 512
"""A large page."""
MAX_REQUEST = 512
PAGE = 4096

_HEAD = struct.Struct("<4sBBHI")
_CHECK = struct.Struct("<I")
HEADER_SIZE = _HEAD.size + _CHECK.size
_PAGES = struct.Struct("<II")
_PAGESET = struct.Struct("<IIQ")


class Kind(IntEnum):
    """What a frame is."""

    MESSAGE = 1
    PAGES = 2
    REQUEST = 3
    PAGESET = 4
    STREAM = 5
    PACKED = 6


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame; ``payload`` is a view into the decoder's buffer, gone with the next call of its ``get_buffer``."""

    kind: Kind
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Pages:
    """The payload of PAGES: ``runs`` as (first, count), ``zero`` one bool a page, ``data`` of those that are not."""

    runs: list[tuple[int, int]]
    zero: NDArray[np.bool_]
    data: memoryview


@dataclass(frozen=True, slots=True)
class PageSetPart:
    """The payload of PAGESET: the bits of pages ``first`` and following."""

    name: int
    first: int
    bits: NDArray[np.uint8]


def header(kind: Kind, length: int) -> bytes:
    """The header of a frame."""
    head = _HEAD.pack(MAGIC, VERSION, kind, 0, length)
    return head + _CHECK.pack(zlib.crc32(head))


def read_header(raw: memoryview) -> tuple[Kind, int]:
    """The kind and payload length that a header announces.

    :raise PeerError: it is no header of ours.
    """
    magic, version, kind, flags, length = _HEAD.unpack_from(raw)
    (check,) = _CHECK.unpack_from(raw, _HEAD.size)
    if magic != MAGIC:
        raise PeerError("the peer does not speak Outboard's protocol")
    if version != VERSION:
        raise PeerError(
            f"the peer speaks version {version} of the protocol, this host {VERSION}; upgrade the older one"
        )
    if check != zlib.crc32(raw[: _HEAD.size]) or flags:
        raise PeerError("the peer sent a damaged frame header")
    if length > MAX_PAYLOAD:
        raise PeerError(f"the peer announced a frame of {length} bytes; {MAX_PAYLOAD} is the most")
    if kind not in _KINDS:
        raise PeerError(f"the peer sent a frame of unknown kind {kind}")
    return _KINDS[kind], length


def pages_head(runs: list[tuple[int, int]], zero: NDArray[np.bool_]) -> bytes:
    """All of a PAGES frame but the data: header, runs and zero bits.

    :param runs: (first, count) each; :param zero: one bool a page of theirs.
    """
    bits = np.packbits(zero, bitorder="little")
    body = _PAGES.pack(len(runs), zero.size) + encode_runs(runs) + bits.tobytes()
    data = (zero.size - int(np.count_nonzero(zero))) * PAGE
    return header(Kind.PAGES, len(body) + data) + body


def decode_pages(payload: memoryview, limit: int) -> Pages:
    """Read the payload of PAGES.

    :param limit: how many pages the guest has.
    :raise PeerError: counts that do not add up, or a page outside ``[0, limit)``.
    """
    runs, page_count, bits_at = decode_runs(payload, _PAGES.size, limit)
    data_at = bits_at + (page_count + 7) // 8
    if len(payload) < data_at:
        raise PeerError("a PAGES frame ends before its pages")
    raw = np.frombuffer(payload, dtype=np.uint8, count=data_at - bits_at, offset=bits_at)
    zero = np.unpackbits(raw, count=page_count, bitorder="little").view(np.bool_)
    data = payload[data_at:]
    full = page_count - int(np.count_nonzero(zero))
    if len(data) != full * PAGE:
        raise PeerError(f"a PAGES frame carries {len(data)} bytes for {full} pages")
    return Pages(runs, zero, data)


def encode_runs(runs: list[tuple[int, int]]) -> bytes:
    """Runs as they stand in a payload."""
    return struct.pack(f"<{2 * len(runs)}Q", *(word for run in runs for word in run))


def decode_runs(payload: memoryview, head: int, limit: int) -> tuple[list[tuple[int, int]], int, int]:
    """Read the counts that a payload begins with, and the runs that follow the ``head`` bytes of its head.

    :return: the runs as (first, count), their pages, and where in the payload they end.
    :raise PeerError: counts that do not add up, or a page outside ``[0, limit)``.
    """
    if len(payload) < head:
        raise PeerError("a frame of pages ends before its counts")
    run_count, page_count = _PAGES.unpack_from(payload)
    if not 0 < run_count <= page_count <= MAX_PAGES:
        raise PeerError(f"a frame announces {page_count} pages in {run_count} runs; {MAX_PAGES} pages is the most")
    end = head + 16 * run_count
    if len(payload) < end:
        raise PeerError("a frame of pages ends before its runs")
    words = struct.unpack_from(f"<{2 * run_count}Q", payload, head)
    counts = words[1::2]
    if sum(counts) != page_count or 0 in counts:
        raise PeerError("the runs of a frame do not add up to its pages")
    runs = list(zip(words[::2], counts, strict=True))
    if any(first + count > limit for first, count in runs):
        raise PeerError(f"a frame names a page beyond the guest's {limit}")
    return runs, page_count, end


def decode_request(payload: memoryview, limit: int) -> tuple[int, ...]:
    """Read the payload of REQUEST.

    :raise PeerError: too many numbers, or one outside ``[0, limit)``.
    """
    if len(payload) % 8 or not 0 < len(payload) <= 8 * MAX_REQUEST:
        raise PeerError(f"a REQUEST frame of {len(payload)} bytes holds no list of 1 to {MAX_REQUEST} pages")
    numbers: tuple[int, ...] = struct.unpack(f"<{len(payload) // 8}Q", payload)
    if max(numbers) >= limit:
        raise PeerError(f"a REQUEST frame names a page beyond the guest's {limit}")
    return numbers


def pageset_head(name: int, first: int) -> bytes:
    """What comes before the bits in the payload of PAGESET."""
    return _PAGESET.pack(name, 0, first)


def decode_pageset(payload: memoryview, limit: int) -> PageSetPart:
    """Read the payload of PAGESET.

    :raise PeerError: bits for pages outside ``[0, limit)``.
    """
    if len(payload) < _PAGESET.size:
        raise PeerError("a PAGESET frame ends before its first page")
    name, zero, first = _PAGESET.unpack_from(payload)
    bits = np.frombuffer(payload[_PAGESET.size :], dtype=np.uint8)
    room = (limit + 7) // 8
    if zero or first % 8 or first // 8 > room or bits.size > room - first // 8:
        raise PeerError(f"a PAGESET frame names pages beyond the guest's {limit}")
    if limit % 8 and bits.size and first // 8 + bits.size == room and bits[-1] >> (limit % 8):
        raise PeerError(f"a PAGESET frame names pages beyond the guest's {limit}")
    return PageSetPart(name, first, bits.copy())


class Decoder:
    """Cuts a stream of bytes into frames.

    Bytes are received straight into its buffer: ``get_buffer``, fill, ``buffer_updated(n)``, then ``next`` until it has
    no whole frame. A frame larger than what has come is waited for where it lies, so page data is never copied.

    Synchronization: one thread.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(2 * (HEADER_SIZE + MAX_PAYLOAD))
        self._view = memoryview(self._buffer)
        self._address: int | None = None
        self._start = self._end = 0
        self._broken: PeerError | None = None

    def get_buffer(self) -> memoryview:
        """Where the next bytes go: at least the rest of the frame that has begun. Ends the life of earlier payloads."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._start < HEADER_SIZE + MAX_PAYLOAD:
            # The rest may not fit behind: move what there is of it, less than one frame, to the front.
            size = self._end - self._start
            self._view[:size] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, size
        return self._view[self._end :]

    def buffer_updated(self, size: int) -> None:
        """``size`` bytes have been put into the buffer."""
        self._end += size

    def next(self) -> Frame | None:
        """The next whole frame, if one has come.

        :raise PeerError: what came is no frame; every later call says so again.
        """
        if self._broken is not None:
            raise self._broken
        if self._end - self._start < HEADER_SIZE:
            return None
        try:
            kind, length = read_header(self._view[self._start : self._start + HEADER_SIZE])
        except PeerError as error:
            self._broken = error
            raise
        begin = self._start + HEADER_SIZE
        if self._end - begin < length:
            return None
        self._start = begin + length
        return Frame(kind, self._view[begin : begin + length])

    def missing(self) -> int:
        """How many more bytes there must at least be for the next frame to be whole; 0 or less when it is.

        :raise PeerError: what came is no frame.
        """
        size = self._end - self._start
        if size < HEADER_SIZE:
            return HEADER_SIZE - size
        _, length = read_header(self._view[self._start : self._start + HEADER_SIZE])
        return HEADER_SIZE + length - size

    def untaken(self) -> memoryview:
        """What has come and was not taken, as it lies in the buffer."""
        return self._view[self._start : self._end]

    def address(self) -> int:
        """Where :meth:`untaken` lies in this process."""
        if self._address is None:
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        return self._address + self._start

    def take(self, size: int) -> None:
        """Take the next ``size`` bytes, which the caller has understood by itself."""
        self._start += size

    @property
    def partial(self) -> bool:
        """Whether a frame has begun that has not ended."""
        return self._end > self._start
