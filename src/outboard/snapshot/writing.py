"""Writing a snapshot's file so that it is there whole or not at all.

It grows under another name, locked by its writer; complete and on the disk it is renamed. What a writer that died has
left is nobody's, and goes when the next one begins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from outboard.errors import KernelError, RefusedError, StoreFullError
from outboard.pages import PAGE_SIZE
from outboard.pages.content import keyed_digests
from outboard.snapshot import sorting
from outboard.stores import snapshot_format
from outboard.stores.snapshot import SUFFIX
from outboard.stores.snapshot_format import CHUNK_PAGES, Chunks, Codec, Contents, Image, Kind, Meta, Table

PARTIAL = ".partial"
_LEVEL = 1


class _Stream:
    """New pages on their way into chunks: those of one stream share theirs."""

    def __init__(self) -> None:
        self.opened: NDArray[np.int64] = np.array([-1, 0, 0], dtype=np.int64)
        self.buffer: NDArray[np.uint8] = np.empty(CHUNK_PAGES * PAGE_SIZE, dtype=np.uint8)
        self.fill = 0


class SnapshotWriter:
    """The file of a snapshot of ``pages`` pages that is being made in ``directory``; a context manager.

    :param parent: what it goes on from; a page that it has is a reference.
    :raise KernelError: the file cannot be made.

    Left before :meth:`finish`, nothing remains.

    Synchronization: one thread.
    """

    def __init__(self, directory: Path, name: str, pages: int, seed: int, parent: Contents | None = None) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = directory / f"{snapshot_format.check_id(name)}{SUFFIX}"
        self._partial = self._path.with_name(self._path.name + PARTIAL)
        self._name, self._seed, self._parent = name, seed, parent
        self._table = Table(
            np.full(pages, 255, dtype=np.uint8),
            np.zeros(pages, dtype=np.uint64),
            np.zeros((pages, 2), dtype=np.uint64),
            np.empty(0, dtype=np.uint32),
            np.empty(0, dtype=np.uint64),
            np.empty(0, dtype=np.uint32),
        )
        none = np.empty(0, dtype=np.uint8), np.empty((0, 2), dtype=np.uint64)
        self._before = none if parent is None else (parent.table.kinds, parent.table.digests)
        self._known = sorting.known(pages)
        self._cold, self._hot = _Stream(), _Stream()
        self._next = 0
        self._hot_chunks: list[int] = []
        self._images: list[Image] = []
        self._block_images: list[NDArray[np.uint32]] = []
        self._offsets: list[NDArray[np.uint64]] = []
        self._chunks: list[tuple[int, int, int, int, int, int]] = []
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        with locked(directory):
            _remove_partial(directory)
            try:
                self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise KernelError(f"making of {self._partial}", error.errno or errno.EIO) from error
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._at = 0
        self._write(snapshot_format.header(seed))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._at

    def _write(self, data: bytes) -> int:
        at = self._at
        try:
            done = os.pwrite(self._fd, data, at)
            if done != len(data):
                # A short write is a full disk that has not said so yet.
                raise OSError(errno.ENOSPC, "short write")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(
                    f"the disk of {self._path} is full after {at} bytes: no snapshot was made; free some and try again"
                ) from error
            raise KernelError(f"write of {self._partial}", error.errno or errno.EIO) from error
        self._at += len(data)
        return at

    def add(
        self, numbers: NDArray[np.int64], content: NDArray[np.uint8], zero: NDArray[np.bool_], *, hot: bool = False
    ) -> None:
        """Take pages, each once.

        :param content: of all of them, one after the other. :param zero: which of them are all zeros.
        :param hot: somebody was in a hurry for them.
        :raise StoreFullError: the disk is full.
        :raise KernelError: the file cannot be written.
        """
        stream = self._hot if hot else self._cold
        fresh = np.empty(numbers.size, dtype=np.int64)
        stream.opened[2] = self._next
        before = int(stream.opened[0]) if stream.opened[1] < CHUNK_PAGES else -1
        count = sorting.sort_out(
            numbers,
            content,
            zero,
            self._seed,
            self._known,
            self._table.kinds,
            self._table.places,
            self._table.digests,
            *self._before,
            stream.opened,
            fresh,
        )
        chunks = [] if before < 0 else [before]
        chunks += range(self._next, int(stream.opened[2]))
        if hot:
            self._hot_chunks += range(self._next, int(stream.opened[2]))
        self._next = int(stream.opened[2])
        self._fill(stream, content.reshape(-1, PAGE_SIZE)[fresh[:count]].reshape(-1), chunks)

    def refer(
        self,
        numbers: NDArray[np.int64],
        content: NDArray[np.uint8],
        path: Path,
        offsets: NDArray[np.int64],
    ) -> None:
        """Take pages, each once, that are blocks of the image ``path``, which nobody writes to any more.

        Whoever calls this has compared them byte by byte. They are read from there when they are wanted.

        :param content: of all of them, one after the other. :param offsets: where each begins in the image's file.
        :raise KernelError: there is no such file.
        """
        image = self._image(path)
        table = self._table
        table.kinds[numbers] = Kind.DISK
        table.places[numbers] = np.arange(numbers.size, dtype=np.uint64) + np.uint64(sum(map(len, self._offsets)))
        table.digests[numbers] = keyed_digests(content, self._seed)
        self._offsets.append(offsets.astype(np.uint64))
        self._block_images.append(np.full(numbers.size, image, dtype=np.uint32))

    def _image(self, path: Path) -> int:
        for number, image in enumerate(self._images):
            if image.path == str(path):
                return number
        try:
            now = path.stat()
        except OSError as error:
            raise KernelError(f"stat of the image {path}", error.errno or errno.EIO) from error
        self._images.append(Image(str(path), now.st_size, now.st_mtime_ns))
        return len(self._images) - 1

    def _fill(self, stream: _Stream, content: NDArray[np.uint8], chunks: list[int]) -> None:
        """Lay new pages into the stream's open chunk and those after it; full ones are stored."""
        whole = CHUNK_PAGES * PAGE_SIZE
        at = 0
        for chunk in chunks:
            part = content[at : at + whole - stream.fill]
            stream.buffer[stream.fill : stream.fill + part.size] = part
            stream.fill += part.size
            at += part.size
            if stream.fill == whole:
                self._store(stream, chunk)

    def _store(self, stream: _Stream, chunk: int) -> None:
        raw = stream.buffer[: stream.fill].tobytes()
        packed = self._compressor.compress(raw)
        data, codec = (packed, Codec.ZSTD) if len(packed) < len(raw) else (raw, Codec.RAW)
        at = self._write(data)
        digest = xxhash.xxh3_64_intdigest(data, seed=self._seed)
        self._chunks.append((chunk, at, len(data), digest, stream.fill // PAGE_SIZE, codec))
        stream.fill = 0

    def finish(self, meta: Meta, devices: bytes) -> Contents:
        """Complete the file and give it its name.

        :raise ValueError: pages were not added.
        :raise StoreFullError, KernelError: as :meth:`add`; nothing remains.
        """
        if np.any(self._table.kinds == 255):
            raise ValueError(f"{np.count_nonzero(self._table.kinds == 255)} pages of {meta.vm} were never added")
        for stream in (self._hot, self._cold):
            if stream.fill:
                self._store(stream, int(stream.opened[0]))
        self._chunks.sort()
        columns = zip(*self._chunks, strict=True) if self._chunks else iter([()] * 6)
        _, offsets, lengths, digests, pages, codecs = (list(column) for column in columns)
        chunks = Chunks(
            np.array(offsets, dtype=np.uint64),
            np.array(lengths, dtype=np.uint32),
            np.array(digests, dtype=np.uint64),
            np.array(pages, dtype=np.uint8),
            np.array(codecs, dtype=np.uint8),
        )
        table = Table(
            self._table.kinds,
            self._table.places,
            self._table.digests,
            np.concatenate([self._table.block_images, *self._block_images]),
            np.concatenate([self._table.block_offsets, *self._offsets]),
            np.array(self._hot_chunks, dtype=np.uint32),
        )
        meta = msgspec.structs.replace(meta, images=self._images)
        tail, digest = snapshot_format.index_and_footer(self._at, meta, devices, chunks, table)
        self._write(tail)
        self._settle()
        return Contents(self._path, meta, devices, chunks, table, digest, self._at)

    def _settle(self) -> None:
        """On the disk first, then under its name, then the name on the disk."""
        try:
            os.fsync(self._fd)
            if self._path.exists():
                raise RefusedError("snapshot-exists", f"there is a snapshot {self._name} already")
            self._partial.rename(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            if isinstance(error, RefusedError):
                raise
            raise KernelError(f"completion of {self._path}", error.errno or errno.EIO) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.unlink(missing_ok=True)
        os.close(self._fd)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the one who makes or removes files in ``directory``, for a moment."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_partial(directory: Path) -> None:
    """Remove what writers that died have left."""
    if directory.exists():
        with locked(directory):
            _remove_partial(directory)


def _remove_partial(directory: Path) -> None:
    for path in directory.glob(f"*{SUFFIX}{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                # Its writer is at work.
                pass
            finally:
                os.close(fd)
