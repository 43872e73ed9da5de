"""The metadata of qcow2 images, versions 2 and 3, as far as reading takes.

A table of two levels says where each cluster of the disk lies in the file: in a cluster of its own, compressed, known
to be zeros, or not here, which means in the image below. All of it is read anew each time: QEMU may have it open.
What it holds back in its own memory of the *active* image is not seen; an image below another does not change.

The file may be anybody's, and every offset in it is held against the file's size before it is used.

Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from outboard.errors import RefusedError
from outboard.stores.images.files import ImageFile

MAGIC = b"QFI\xfb"
_HEAD = struct.Struct(">4sIQIIQIIQQIIQ")
_MORE = struct.Struct(">QQQII")
_V2_LENGTH, _V3_LENGTH = 72, 104
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_MOST_BACKING = 1023
_MOST_L1 = 32 << 20
"""Bytes, as in QEMU."""
_DIRTY, _CORRUPT, _EXTERNAL, _COMPRESSION, _SUBCLUSTERS = (1 << bit for bit in range(5))
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_COMPRESSED, _ZERO = np.uint64(1 << 62), np.uint64(1)
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Clusters:
    """A stretch of the disk, a cluster an entry: ``first`` is the number of the first.

    ``data`` is where in the file the cluster lies, 0 where it does not; ``zero`` and ``compressed`` say of the others
    which are known to be zeros and which are the entry of a compressed cluster. What is none of these is not here.
    """

    first: int
    data: NDArray[np.uint64]
    zero: NDArray[np.bool_]
    compressed: NDArray[np.uint64]


class Qcow2:
    """The metadata of the image in ``file``.

    ``size`` of the disk and ``cluster`` in bytes; ``backing`` is what the image calls the one below, None if there is
    none, and ``backing_format`` its format, None where that is not said.

    :raise RefusedError: ``image-damaged``; ``image-encrypted``; ``image-external-data``; ``image-feature``.
    :raise KernelError: it cannot be read.

    Synchronization: none is needed; it does not change.
    """

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        head = _HEAD.unpack(file.read(_HEAD.size, 0))
        magic, version, backing_at, backing_size, bits, self.size, crypt, self._l1_size, self._l1_at = head[:9]
        if magic != MAGIC or version not in (2, 3):
            raise self._damaged(f"is no qcow2 image of version 2 or 3 (it begins with {magic!r}, version {version})")
        if not 9 <= bits <= 21:
            raise self._damaged(f"has clusters of 2^{bits} bytes")
        self.cluster = 1 << bits
        self._bits = bits
        if crypt:
            raise RefusedError("image-encrypted", f"{file.path} is encrypted: its blocks are not what the guest reads")
        self._zstd = False
        length = _V2_LENGTH if version == 2 else self._features(file)
        self.backing_format: str | None = None
        self._extensions(length, backing_at)
        self.backing: str | None = None
        if backing_at:
            if not 0 < backing_size <= _MOST_BACKING:
                raise self._damaged(f"has a name of {backing_size} bytes for the image below")
            self.backing = self._name(file.read(backing_size, backing_at))
        per_table = self.cluster // 8
        needed = -(-self.size // (self.cluster * per_table))
        if not needed <= self._l1_size <= _MOST_L1 // 8 or self._l1_at % self.cluster:
            raise self._damaged(
                f"has a first table of {self._l1_size} entries at {self._l1_at} for a disk of {self.size} bytes"
            )
        self._l1_used = needed
        self._per_table = per_table

    def _name(self, raw: bytes) -> str:
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = "\0"
        if "\0" in name:
            raise self._damaged(f"calls the image below {raw!r}, which is no path")
        return name

    def _damaged(self, words: str) -> RefusedError:
        return RefusedError("image-damaged", f"{self._file.path} {words}; qemu-img check tells more")

    def _features(self, file: ImageFile) -> int:
        incompatible, _, _, _, length = _MORE.unpack(file.read(_MORE.size, _V2_LENGTH))
        if incompatible & _CORRUPT:
            raise self._damaged("is marked as corrupt")
        if incompatible & _EXTERNAL:
            raise RefusedError(
                "image-external-data", f"{file.path} keeps its data in another file, whose blocks are not looked up"
            )
        unknown = incompatible & ~(_DIRTY | _COMPRESSION)
        if unknown:
            what = "clusters in parts (extended_l2)" if unknown == _SUBCLUSTERS else f"features {unknown:#x}"
            raise RefusedError("image-feature", f"{file.path} has {what}, which are not understood here")
        if not _V3_LENGTH <= length <= self.cluster:
            raise self._damaged(f"has a header of {length} bytes")
        if incompatible & _COMPRESSION:
            kind = file.read(1, _V3_LENGTH)[0]
            if kind != 1:
                raise RefusedError("image-feature", f"{file.path} is compressed by method {kind}, unknown here")
            self._zstd = True
        return int(length)

    def _extensions(self, at: int, backing_at: int) -> None:
        # They lie before the name of the image below, and in the first cluster.
        end = backing_at or self.cluster
        while at + _EXTENSION.size <= min(end, self._file.size):
            kind, length = _EXTENSION.unpack(self._file.read(_EXTENSION.size, at))
            at += _EXTENSION.size
            if not kind:
                return
            if at + length > self.cluster:
                raise self._damaged(f"has a header extension of {length} bytes")
            if kind == _BACKING_FORMAT:
                self.backing_format = self._file.read(length, at).decode("ascii", errors="replace")
            at += -(-length // 8) * 8

    def clusters(self, first: int = 0, count: int | None = None) -> Iterator[Clusters]:
        """Where clusters ``[first, first + count)`` lie (all of them where ``count`` is None), a table at a time.

        Tables that are not there are left out.
        """
        total = -(-self.size // self.cluster)
        end = total if count is None else min(total, first + count)
        low, high = first // self._per_table, -(-end // self._per_table)
        l1 = np.frombuffer(self._file.read(8 * (high - low), self._l1_at + 8 * low), dtype=">u8").astype(np.uint64)
        for number, entry in enumerate(l1 & _OFFSET, start=low):
            if not entry:
                continue
            if int(entry) % self.cluster:
                raise self._damaged(f"has a second table at {entry}, where no cluster begins")
            begin = max(first, number * self._per_table)
            length = min(end, (number + 1) * self._per_table) - begin
            skip = 8 * (begin - number * self._per_table)
            raw = np.frombuffer(self._file.read(8 * length, int(entry) + skip), dtype=">u8").astype(np.uint64)
            yield self._decoded(begin, raw)

    def _decoded(self, first: int, entries: NDArray[np.uint64]) -> Clusters:
        packed = (entries & _COMPRESSED) != 0
        zero = ~packed & ((entries & _ZERO) != 0)
        data = np.where(packed | zero, np.uint64(0), entries & _OFFSET)
        if np.any(data % np.uint64(self.cluster)) or (data.size and int(data.max()) >= max(1, self._file.size)):
            raise self._damaged(f"has data of cluster {first} or behind where no cluster of the file begins")
        return Clusters(first, data, zero, np.where(packed, entries, np.uint64(0)))

    def unpacked(self, entry: int) -> bytes:
        """The content of a compressed cluster.

        :raise RefusedError: ``image-damaged``.
        """
        shift = 62 - (self._bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry >> shift) & ((1 << (self._bits - 8)) - 1)
        length = min((sectors + 1) * _SECTOR - offset % _SECTOR, self._file.size - offset)
        if length <= 0:
            raise self._damaged(f"has a compressed cluster at {offset}, behind its end")
        raw = self._file.read(length, offset)
        try:
            if self._zstd:
                content = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
            else:
                content = zlib.decompressobj(-12).decompress(raw, self.cluster)
        except (zlib.error, zstandard.ZstdError) as error:
            raise self._damaged(f"has a compressed cluster at {offset} that cannot be unpacked ({error})") from error
        if len(content) < self.cluster:
            raise self._damaged(f"has a compressed cluster at {offset} of {len(content)} bytes")
        return content[: self.cluster]
