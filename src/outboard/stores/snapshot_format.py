"""The file of one snapshot, as docs/snapshot-format.md describes it: header, chunks, index, footer.

Everything read from it is checked before it is used: lengths, page numbers, digests. A file that does not hold what was
written is refused, and the refusal names the byte from which on it does not.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
import zstandard
from numpy.typing import DTypeLike, NDArray

from outboard.errors import KernelError, NotFoundError, RefusedError
from outboard.pages import PAGE_SIZE

VERSION = 1
CHUNK_PAGES = 16
"""Pages of a chunk: small enough to be unpacked for one fault, large enough to pack well."""
SLOT_BITS = 8
"""A place is a chunk's number and, in the low bits, a page's slot in it."""
HEADER = struct.Struct("<8sIIIIQQ")
FOOTER = struct.Struct("<QQQ32sQ8s")
_HEAD, _TAIL = b"OUTBSNAP", b"PANSBTUO"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9]{8}T[0-9]{6}-[0-9a-f]{6}")
_MOST_PAGES = 1 << 34
_MOST_STATE = 1 << 28
_PER_PAGE = 32
"""Bytes of an index for each page at most."""


class Kind(IntEnum):
    """What a snapshot says of a page."""

    ZERO = 0
    """It is all zeros."""
    HERE = 1
    """It is in a chunk of this file."""
    PARENT = 2
    """It is what the parent says."""
    DISK = 3
    """It is a block of a disk's image."""


class Codec(IntEnum):
    """How a chunk is stored."""

    RAW = 0
    ZSTD = 1


class Parent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The snapshot that this one goes on from; ``digest`` is that of its index."""

    id: str
    digest: str


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that blocks are taken from, as it was: ``modified`` in nanoseconds since 1970."""

    path: str
    size: int
    modified: int


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of a snapshot besides its pages.

    :ivar layout: of each region the first page, the pages and the guest-physical address.
    :ivar spec: the TOML that starts the VM; its disks are the ones that hold still since.
    :ivar running: whether the guest ran.
    :ivar seed: of the page digests, the same along a chain.
    """

    id: str
    vm: str
    created: float
    spec: str
    running: bool
    layout: list[tuple[int, int, int]]
    seed: int
    parent: Parent | None = None
    images: list[Image] = []


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    meta: Meta
    devices: bytes
    chunk_offsets: bytes
    chunk_lengths: bytes
    chunk_digests: bytes
    chunk_pages: bytes
    chunk_codecs: bytes
    kinds: bytes
    places: bytes
    digests: bytes
    block_images: bytes
    block_offsets: bytes
    hot: bytes


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where chunks lie: bytes, XXH3 of what is stored, pages in each, a :class:`Codec`."""

    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint32]
    digests: NDArray[np.uint64]
    pages: NDArray[np.uint8]
    codecs: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Table:
    """What a snapshot says of its pages.

    :ivar kinds: a :class:`Kind` each. :ivar places: in a chunk, or the number of a block.
    :ivar digests: shape (pages, 2), of each page that is not all zeros; zeros for a block that is not in memory.
    :ivar block_images, block_offsets: of each block its image's number and the byte where it begins.
    :ivar hot: chunks in the order in which they will be wanted, as far as known when it was taken.
    """

    kinds: NDArray[np.uint8]
    places: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    block_images: NDArray[np.uint32]
    block_offsets: NDArray[np.uint64]
    hot: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Contents:
    """A snapshot's file as it was read: ``digest`` of its index names it among all that ever were."""

    path: Path
    meta: Meta
    devices: bytes
    chunks: Chunks
    table: Table
    digest: str
    size: int

    @property
    def pages(self) -> int:
        """Of the guest."""
        return self.table.kinds.size


def check_id(name: str) -> str:
    """See that ``name`` can be a snapshot's, before it becomes part of a path.

    :raise NotFoundError: it cannot.
    """
    if _ID.fullmatch(name) is None:
        raise NotFoundError(f"{name!r} names no snapshot; outboard snapshot ls lists them")
    return name


def damaged(path: Path, at: int, why: str) -> RefusedError:
    """The refusal of a file that is not what was written."""
    return RefusedError("damaged-snapshot", f"{path} is not what was written, from byte {at} on: {why}")


def header(seed: int) -> bytes:
    """The first bytes of a file."""
    bare = HEADER.pack(_HEAD, VERSION, PAGE_SIZE, CHUNK_PAGES, 0, seed, 0)[:-8]
    return bare + struct.pack("<Q", xxhash.xxh3_64_intdigest(bare))


def index_and_footer(offset: int, meta: Meta, devices: bytes, chunks: Chunks, table: Table) -> tuple[bytes, str]:
    """The last bytes of a file whose chunks end at ``offset``, and the digest that names it."""

    def raw(array: NDArray[Any], kind: str) -> bytes:
        return array.astype(kind).tobytes()

    index = msgspec.msgpack.encode(
        _Index(
            meta,
            devices,
            raw(chunks.offsets, "<u8"),
            raw(chunks.lengths, "<u4"),
            raw(chunks.digests, "<u8"),
            raw(chunks.pages, "u1"),
            raw(chunks.codecs, "u1"),
            raw(table.kinds, "u1"),
            raw(table.places[np.isin(table.kinds, _PLACED)], "<u8"),
            raw(table.digests[table.kinds != Kind.ZERO], "<u8"),
            raw(table.block_images, "<u4"),
            raw(table.block_offsets, "<u8"),
            raw(table.hot, "<u4"),
        )
    )
    packed = zstandard.ZstdCompressor(level=1).compress(index)
    digest = hashlib.sha256(packed)
    bare = FOOTER.pack(offset, len(packed), len(index), digest.digest(), 0, _TAIL)[:-16]
    return packed + bare + struct.pack("<Q8s", xxhash.xxh3_64_intdigest(bare), _TAIL), digest.hexdigest()


_PLACED = (Kind.HERE, Kind.DISK)


def read(path: Path) -> Contents:
    """Read a snapshot's file, but for its chunks.

    :raise NotFoundError: there is none.
    :raise RefusedError: ``damaged-snapshot``: it is truncated or altered, from which byte on;
        ``snapshot-version``: it was written by a later version.
    :raise KernelError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no snapshot {path}") from error
    except OSError as error:
        raise KernelError(f"open of {path}", error.errno or errno.EIO) from error
    try:
        return _read(fd, path)
    except OSError as error:
        if isinstance(error, KernelError):
            raise
        raise KernelError(f"read of {path}", error.errno or errno.EIO) from error
    finally:
        os.close(fd)


def _read(fd: int, path: Path) -> Contents:
    size = os.fstat(fd).st_size
    seed = _read_header(os.pread(fd, HEADER.size, 0), path, size)
    at = size - FOOTER.size
    tail = os.pread(fd, FOOTER.size, max(0, at))
    if at < HEADER.size or not tail.endswith(_TAIL):
        raise damaged(
            path,
            max(0, at),
            f"no footer is there, which ends a complete snapshot; it was cut at byte {size}, or altered",
        )
    offset, length, whole, digest, check, _ = FOOTER.unpack(tail)
    if check != xxhash.xxh3_64_intdigest(tail[:-16]):
        raise damaged(path, at, "the footer's digest is another")
    if offset < HEADER.size or offset + length != at:
        raise damaged(path, at, f"the footer places an index of {length} bytes at {offset}, and it begins at {at}")
    packed = os.pread(fd, length, offset)
    if len(packed) != length or hashlib.sha256(packed).digest() != digest:
        raise damaged(path, offset, "the index's digest is another")
    if whole > _MOST_STATE + _MOST_PAGES * _PER_PAGE or whole > (length + 64) << 16:
        raise damaged(path, at, f"an index of {whole} bytes is none")
    try:
        index = msgspec.msgpack.decode(
            zstandard.ZstdDecompressor().decompress(packed, max_output_size=whole), type=_Index
        )
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise damaged(path, offset, f"the index cannot be read: {error}") from error
    try:
        chunks, table = _tables(index, offset)
    except ValueError as error:
        raise damaged(path, offset, f"the index contradicts itself: {error}") from error
    if index.meta.seed != seed:
        raise damaged(path, 0, "the header belongs to another snapshot")
    return Contents(path, index.meta, index.devices, chunks, table, digest.hex(), size)


def _read_header(head: bytes, path: Path, size: int) -> int:
    if len(head) < HEADER.size:
        raise damaged(path, 0, f"it was cut at byte {size}, in the header")
    magic, version, page, chunk, reserved, seed, check = HEADER.unpack(head)
    if magic != _HEAD:
        raise damaged(path, 0, "it does not begin as a snapshot does")
    if check != xxhash.xxh3_64_intdigest(head[:-8]):
        raise damaged(path, 8, "the header's digest is another")
    if (version, page, chunk, reserved) != (VERSION, PAGE_SIZE, CHUNK_PAGES, 0):
        raise RefusedError(
            "snapshot-version",
            f"{path} is of version {version}, with {chunk} pages of {page} bytes in a chunk; this is Outboard of "
            f"version {VERSION}, {CHUNK_PAGES} and {PAGE_SIZE}: use the one that wrote it",
        )
    return int(seed)


def _array(raw: bytes, kind: str, native: DTypeLike, count: int | None, what: str) -> NDArray[Any]:
    width = np.dtype(kind).itemsize
    if len(raw) % width or (count is not None and len(raw) != count * width):
        raise ValueError(f"{what} are {len(raw)} bytes, for {count} of {width}")
    return np.frombuffer(raw, dtype=kind).astype(native)


def _require(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _tables(index: _Index, end: int) -> tuple[Chunks, Table]:
    """The index's arrays, each entry within bounds.

    :raise ValueError: one is not.
    """
    _require(len(index.devices) <= _MOST_STATE, "the devices' state is larger than any")
    chunks = _chunks(index, end)
    count = chunks.offsets.size
    kinds = _array(index.kinds, "u1", np.uint8, None, "kinds")
    _layout(index.meta, kinds.size)
    _require(not kinds.size or kinds.max() <= max(Kind), "a page of an unknown kind")
    _require(
        index.meta.parent is not None or not np.any(kinds == Kind.PARENT), "a page is its parent's, and none is named"
    )
    placed = np.isin(kinds, _PLACED)
    places = np.zeros(kinds.size, dtype=np.uint64)
    places[placed] = _array(index.places, "<u8", np.uint64, int(np.count_nonzero(placed)), "places")
    here = places[kinds == Kind.HERE]
    numbers = here >> np.uint64(SLOT_BITS)
    _require(not here.size or numbers.max() < count, "a page is in a chunk that is not there")
    _require(
        np.all((here & np.uint64((1 << SLOT_BITS) - 1)) < chunks.pages[numbers.astype(np.int64)]),
        "a page is in a slot that its chunk does not have",
    )
    images = _array(index.block_images, "<u4", np.uint32, None, "blocks' images")
    offsets = _array(index.block_offsets, "<u8", np.uint64, images.size, "blocks' offsets")
    blocks = places[kinds == Kind.DISK]
    _require(not blocks.size or blocks.max() < images.size, "a page is a block that is not named")
    _require(not images.size or images.max() < len(index.meta.images), "a block is in an image that is not named")
    _require(not offsets.size or offsets.max() < 1 << 62, "a block is beyond any image")
    some = kinds != Kind.ZERO
    digests = np.zeros((kinds.size, 2), dtype=np.uint64)
    digests[some] = _array(index.digests, "<u8", np.uint64, 2 * int(np.count_nonzero(some)), "digests").reshape(-1, 2)
    hot = _array(index.hot, "<u4", np.uint32, None, "hot chunks")
    _require(hot.size <= count and (not hot.size or hot.max() < count), "a hot chunk is not there")
    return chunks, Table(kinds, places, digests, images, offsets, hot)


def _layout(meta: Meta, pages: int) -> None:
    check_id(meta.id)
    at = 0
    for first, count, gpa in meta.layout:
        _require(
            first == at and 0 < count < _MOST_PAGES and 0 <= gpa < 1 << 62, "the regions do not follow one another"
        )
        at += count
    _require(at == pages and pages > 0, f"the regions have {at} pages, the index {pages}")
    _require(0 <= meta.seed < 1 << 64, "the seed is no number of 64 bits")


def _chunks(index: _Index, end: int) -> Chunks:
    pages = _array(index.chunk_pages, "u1", np.uint8, None, "chunks' pages")
    offsets = _array(index.chunk_offsets, "<u8", np.uint64, pages.size, "chunks' offsets")
    lengths = _array(index.chunk_lengths, "<u4", np.uint32, pages.size, "chunks' lengths")
    digests = _array(index.chunk_digests, "<u8", np.uint64, pages.size, "chunks' digests")
    codecs = _array(index.chunk_codecs, "u1", np.uint8, pages.size, "chunks' codecs")
    _require(np.all((pages >= 1) & (pages <= CHUNK_PAGES)), "a chunk of no pages, or too many")
    _require(np.all(codecs <= max(Codec)), "a chunk of an unknown codec")
    whole = pages.astype(np.uint32) * PAGE_SIZE
    _require(
        np.all(np.where(codecs == Codec.RAW, lengths == whole, (lengths > 0) & (lengths < whole))), "a chunk's length"
    )
    _require(not offsets.size or offsets.max() < 1 << 62, "a chunk beyond any file")
    # They cover all that lies between the header and the index, so that no byte goes unchecked.
    order = np.argsort(offsets, kind="stable")
    begins = offsets[order].astype(np.int64)
    edges = np.concatenate(([HEADER.size], begins + lengths[order]))
    _require(np.array_equal(edges, np.concatenate((begins, [end]))), "the chunks do not follow one another")
    return Chunks(offsets, lengths, digests, pages, codecs)
