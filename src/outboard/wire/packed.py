"""PACKED frames: pages in fewer bytes than they have, without I/O.

Payload, little endian::

    runs u32 | pages u32 | codec u32 | bytes of the content as packed u32
    for each run its first page u64 and count u64
    for each page its form, a byte
    for each page KEPT or SAME its slot u16
    for each page BLOCK its image u16 << 48 | block u48, and its digest u64
    the content of pages FULL and KEPT, in order, packed by the codec
    the changes of pages CHANGED, in order, packed as LZ4; nothing where there are none

Both ends of a stream keep the content of the pages that were sent as KEPT, in SLOTS slots, 16 MiB: another page with
that content then goes as SAME. A page CHANGED is what the destination holds of that page already, with the bits of the
change turned over; only before the guest runs there, while nobody but the stream writes its memory. A page BLOCK is a
block of 4 KiB of a disk image that both hosts have, by the image's number among those of the VM and the block's in its
file; what is read there must have the digest, XXH3 of 64 bits, or the page is asked for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.wire.codecs import Codec, Octets, unpack
from outboard.wire.frames import PAGE, Kind, decode_runs, encode_runs, header

SLOTS = 4096
_HEAD = struct.Struct("<IIII")
_BLOCK = 16
_CODECS = {int(codec): codec for codec in Codec}


class Form(IntEnum):
    """How a page goes."""

    ZERO = 0
    FULL = 1
    KEPT = 2
    SAME = 3
    CHANGED = 4
    BLOCK = 5


@dataclass(frozen=True, slots=True)
class Packed:
    """The payload of PACKED, unpacked.

    :ivar runs: (first, count) each. :ivar forms: a :class:`Form` a page.
    :ivar slots: of each page KEPT or SAME. :ivar content: of pages FULL and KEPT, a row of PAGE bytes each.
    :ivar changes: of pages CHANGED, the same. :ivar blocks: of pages BLOCK, a row of locator and digest each.
    """

    runs: list[tuple[int, int]]
    forms: NDArray[np.uint8]
    slots: NDArray[np.uint16]
    content: NDArray[np.uint8]
    changes: NDArray[np.uint8]
    blocks: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))


def _needs_slot(forms: NDArray[np.uint8]) -> NDArray[np.bool_]:
    needs: NDArray[np.bool_] = (forms == Form.KEPT) | (forms == Form.SAME)
    return needs


def packed_frame(
    runs: list[tuple[int, int]],
    forms: NDArray[np.uint8],
    slots: NDArray[np.uint16],
    codec: Codec,
    content: Octets,
    changes: Octets,
    blocks: bytes = b"",
) -> tuple[bytes, Octets, Octets]:
    """A PACKED frame, in three pieces; see :class:`Packed`.

    :param content: packed by ``codec`` already. :param changes: as an LZ4 block, or nothing.
    :param blocks: of pages BLOCK, as they stand in the payload.
    """
    head = _HEAD.pack(len(runs), forms.size, codec, len(content))
    body = head + encode_runs(runs) + forms.tobytes() + slots.astype("<u2").tobytes() + blocks
    return header(Kind.PACKED, len(body) + len(content) + len(changes)) + body, content, changes


def decode_packed(payload: memoryview, limit: int) -> Packed:
    """Read the payload of PACKED.

    :param limit: how many pages the guest has.
    :raise PeerError: counts that do not add up, a page outside ``[0, limit)``, a slot outside ``[0, SLOTS)``, a form or
        a codec that is none, or content that cannot be unpacked.
    """
    runs, page_count, at = decode_runs(payload, _HEAD.size, limit)
    _, _, codec, length = _HEAD.unpack_from(payload)
    if codec not in _CODECS:
        raise PeerError(f"a PACKED frame is packed by codec {codec}, which is none of ours")
    if len(payload) < at + page_count:
        raise PeerError("a PACKED frame ends before its forms")
    forms: NDArray[np.uint8] = np.frombuffer(payload, dtype=np.uint8, count=page_count, offset=at).copy()
    if forms.max() > max(Form):
        raise PeerError(f"a PACKED frame has a page of form {forms.max()}, which is none of ours")
    at += page_count
    slot_count = int(np.count_nonzero(_needs_slot(forms)))
    block_count = int(np.count_nonzero(forms == Form.BLOCK))
    if len(payload) < at + 2 * slot_count + _BLOCK * block_count + length:
        raise PeerError("a PACKED frame ends before its content")
    slots = np.frombuffer(payload, dtype="<u2", count=slot_count, offset=at).astype(np.uint16)
    if slots.size and slots.max() >= SLOTS:
        raise PeerError(f"a PACKED frame names slot {slots.max()}; there are {SLOTS}")
    at += 2 * slot_count
    blocks = np.frombuffer(payload, dtype="<u8", count=2 * block_count, offset=at).astype(np.uint64)
    at += _BLOCK * block_count
    full = int(np.count_nonzero((forms == Form.FULL) | (forms == Form.KEPT)))
    content = unpack(_CODECS[codec], payload[at : at + length], full * PAGE)
    changed = int(np.count_nonzero(forms == Form.CHANGED))
    if not changed and len(payload) > at + length:
        raise PeerError("a PACKED frame goes on behind its content")
    changes = unpack(Codec.LZ4, payload[at + length :], changed * PAGE)
    return Packed(
        runs,
        forms,
        slots,
        np.frombuffer(content, dtype=np.uint8).reshape(full, PAGE),
        np.frombuffer(changes, dtype=np.uint8).reshape(changed, PAGE),
        blocks.reshape(block_count, 2),
    )
