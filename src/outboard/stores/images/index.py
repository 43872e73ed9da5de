"""Which blocks of an image hold what: digests of all its blocks of 4 KiB, in a file that is made once.

An entry is the digest of a block (XXH3, 64 bits) and its number, sorted by digest; blocks of zeros are left out, and of
those that are alike all but the first. That is 12 bytes a block, 3 MiB for a GiB of image with content, in the file and
in memory, where a table of one more byte a block makes a look-up two or three reads.

The file is for the image as it was: another :class:`~outboard.stores.images.files.Identity`, and it is made anew. An
image that nobody writes to is thus read once. One that is written to may be read while it changes, and an overwrite in
place leaves no mark but the time: such an index misses some blocks and names others that have changed. That costs
matches and never truth, since no match counts before every byte has been compared.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests, zero_pages
from outboard.stores.images.files import Identity
from outboard.stores.images.layers import Layer

_MAGIC = b"OBBLOCKS"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQQQQQQQ")
_PART = 4 << 20
_PER_BUCKET_BITS = 2
_MOST_BITS = 28


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """``keys`` (sorted) and ``blocks`` have an entry for each; ``table`` says where the keys of each bucket begin.

    A key's bucket is ``key >> shift``. ``built``: it had to be made.
    """

    keys: NDArray[np.uint64]
    blocks: NDArray[np.uint32]
    table: NDArray[np.uint32]
    shift: int
    built: bool

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return self.keys.nbytes + self.blocks.nbytes + self.table.nbytes


def _indexed(keys: NDArray[np.uint64], blocks: NDArray[np.uint32], *, built: bool) -> LayerIndex:
    bits = min(_MOST_BITS, max(1, keys.size.bit_length() - _PER_BUCKET_BITS))
    shift = 64 - bits
    edges = np.arange(1 << bits, dtype=np.uint64) << np.uint64(shift)
    table = np.append(np.searchsorted(keys, edges), keys.size).astype(np.uint32)
    return LayerIndex(keys, blocks, table, shift, built)


def build(layer: Layer) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Digest an image: the keys, sorted, and the block of each.

    :raise RefusedError: ``image-size``. :raise KernelError: it cannot be read.
    """
    if layer.file.size > PAGE_SIZE << 32:
        raise RefusedError("image-size", f"{layer.path} has {layer.file.size} bytes; 16 TiB are the most")
    buffer: NDArray[np.uint8] = np.empty(_PART, dtype=np.uint8)
    keys, blocks = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
    for offset, length in layer.extents():
        for at in range(offset, offset + length, _PART):
            part = buffer[: min(_PART, offset + length - at)]
            layer.file.read_into(part.data, at)
            full = np.flatnonzero(~zero_pages(part))
            keys.append(page_digests(part)[full])
            blocks.append((full + at // PAGE_SIZE).astype(np.uint32))
    sorted_keys, first = np.unique(np.concatenate(keys), return_index=True)
    return sorted_keys, np.concatenate(blocks)[first]


def _path_of(identity: Identity, directory: Path) -> Path:
    return directory / f"{identity.device:x}-{identity.inode}.blocks"


def _wanted(identity: Identity) -> tuple[object, ...]:
    """What the head of an index for that image begins with."""
    return (_MAGIC, _VERSION, 0, identity.device, identity.inode, identity.size, identity.modified, identity.changed)


def is_there(layer: Layer, directory: Path) -> bool:
    """Whether an index for the image as it is now lies in ``directory``; it may be damaged."""
    identity = layer.file.identity()
    try:
        with _path_of(identity, directory).open("rb") as file:
            raw = file.read(_HEAD.size)
    except OSError:
        return False
    return len(raw) == _HEAD.size and _HEAD.unpack(raw)[:8] == _wanted(identity)


def load(layer: Layer, directory: Path) -> LayerIndex | None:
    """The index that lies in ``directory`` for the image as it is now; None: there is none, or it is damaged."""
    identity = layer.file.identity()
    try:
        with _path_of(identity, directory).open("rb") as file:
            # Mapped, several processes share it. Nobody writes to it, and compiled loops ask for arrays that one may.
            raw = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)
    except (OSError, ValueError):
        # ValueError: it is empty.
        return None
    if raw.size < _HEAD.size:
        return None
    head = _HEAD.unpack(raw[: _HEAD.size].tobytes())
    count, digest = head[8:]
    body = raw[_HEAD.size :]
    if head[:8] != _wanted(identity) or body.size != 12 * count or xxhash.xxh3_64_intdigest(body.data) != digest:
        return None
    keys, blocks = body[: 8 * count].view(np.uint64), body[8 * count :].view(np.uint32)
    return _indexed(keys, blocks, built=False)


def open_index(layer: Layer, directory: Path) -> LayerIndex:
    """The index of an image, made and kept in ``directory`` if there is none for it as it is now.

    :raise RefusedError: ``image-size``; ``image-damaged``. :raise KernelError: it cannot be read, or not be kept.
    """
    found = load(layer, directory)
    if found is not None:
        return found
    identity = layer.file.identity()
    keys, blocks = build(layer)
    body = keys.tobytes() + blocks.tobytes()
    head = _HEAD.pack(
        _MAGIC,
        _VERSION,
        0,
        identity.device,
        identity.inode,
        identity.size,
        identity.modified,
        identity.changed,
        keys.size,
        xxhash.xxh3_64_intdigest(body),
    )
    path = _path_of(identity, directory)
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.write_bytes(head + body)
        fresh.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise KernelError(f"write of the index of {layer.path} to {path}", error.errno or 0) from error
    return _indexed(keys, blocks, built=True)
