"""The snapshot store: pages of a restored VM that are still in the files of a snapshot and those it goes on from.

A *row* is something that is read at once: a chunk of one of the files, or a block of a disk's image. A locator is a row
and, in the low bits, a page's slot in it. Rows are numbered in the order of the chain, the youngest file first, so that
whoever opens the same snapshot later means the same by a locator.

Nothing is ever put here, and nothing dropped: the files are shared by all VMs that were restored from them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.errors import DamagedPageError, KernelError, NotFoundError, RefusedError
from outboard.linux import native
from outboard.pages import PAGE_SIZE
from outboard.pages.content import keyed_digest
from outboard.pages.residency import Where
from outboard.stores import snapshot_format, zstd
from outboard.stores.snapshot_format import CHUNK_PAGES, SLOT_BITS, Codec, Contents, Kind, damaged
from outboard.stores.store import StoreStatistics

SUFFIX = ".snap"
_LONGEST = 1000
"""Files of a chain."""
_ZSTD = int(Codec.ZSTD)
_SLOTS = (1 << SLOT_BITS) - 1
_CHUNK = CHUNK_PAGES * PAGE_SIZE


class Rows(NamedTuple):
    """What compiled loops read rows by, each array by row; ``members`` are the guest's pages by slot, -1 for none."""

    files: NDArray[np.int32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pages: NDArray[np.int64]
    codecs: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    members: NDArray[np.int64]
    seed: NDArray[np.uint64]


class Desk(NamedTuple):
    """What one thread unpacks with; ``held``: the row that ``content`` holds, and the context of zstd.

    ``order`` takes the rows in the order in which they were wanted, behind their number.
    """

    packed: NDArray[np.uint8]
    content: NDArray[np.uint8]
    held: NDArray[np.int64]
    order: NDArray[np.int64]


HELD, _CONTEXT = 0, 1
"""Words of ``Desk.held``."""

_I8, _U8, _U1, _I4 = types.int64[::1], types.uint64[::1], types.uint8[::1], types.int32[::1]
ROWS = types.NamedTuple((_I4, _I8, _I8, _I8, _U1, _U8, types.int64[:, ::1], _U8), Rows)  # type: ignore[no-untyped-call]
DESK = types.NamedTuple((_U1, _U1, _I8, _I8), Desk)  # type: ignore[no-untyped-call]


@njit(types.boolean(ROWS, DESK, types.int64), cache=True, nogil=True)
def hold(rows: Rows, desk: Desk, row: int) -> bool:
    """Have ``desk.content`` hold a row; False: its file does not hold what was written."""
    if desk.held[HELD] == row:
        return True
    desk.held[HELD] = -1
    length, whole = rows.lengths[row], rows.pages[row] * PAGE_SIZE
    packed = rows.codecs[row] == _ZSTD
    into = desk.packed.ctypes.data if packed else desk.content.ctypes.data
    if native.pread(rows.files[row], into, length, rows.offsets[row]) != length:
        return False
    if keyed_digest(into, length, int(rows.seed[0])) != rows.digests[row]:
        return False
    if packed and zstd.unpack(desk.held[_CONTEXT], desk.content.ctypes.data, whole, into, length) != whole:
        return False
    desk.held[HELD] = row
    return True


@njit(types.void(DESK, types.int64), cache=True, nogil=True)
def note_wanted(desk: Desk, row: int) -> None:
    """Note that somebody waited for a row."""
    count = desk.order[0]
    if count + 1 < desk.order.size:
        desk.order[count + 1] = row
        desk.order[0] = count + 1


@njit(types.int64(ROWS, DESK, _U8, _U1), cache=True, nogil=True)
def _fetch(rows: Rows, desk: Desk, locators: NDArray[np.uint64], into: NDArray[np.uint8]) -> int:
    """Read pages one after the other; -1, or the index of the first that is not what was written."""
    for index in range(locators.size):
        locator = int(np.int64(locators[index]))
        if not hold(rows, desk, locator >> SLOT_BITS):
            return index
        slot = locator & _SLOTS
        into[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = desk.content[slot * PAGE_SIZE : (slot + 1) * PAGE_SIZE]
    return -1


def no_rows() -> tuple[Rows, Desk]:
    """For a guest that was not restored."""
    none: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    octets, words = np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint64)
    members = np.empty((0, CHUNK_PAGES), dtype=np.int64)
    rows = Rows(np.empty(0, dtype=np.int32), none, none, none, octets, words, members, words)
    return rows, Desk(octets, octets, none, none)


def open_chain(directory: Path, name: str) -> list[Contents]:
    """A snapshot and those it goes on from, the youngest first.

    :raise NotFoundError: one is not there.
    :raise RefusedError: ``damaged-snapshot``: one is truncated, altered, or another than the one that was gone on from.
    """
    chain = [snapshot_format.read(directory / f"{snapshot_format.check_id(name)}{SUFFIX}")]
    while (parent := chain[-1].meta.parent) is not None:
        child = chain[-1]
        if len(chain) == _LONGEST:
            raise damaged(child.path, 0, f"it goes on from more than {_LONGEST} others")
        chain.append(snapshot_format.read(directory / f"{snapshot_format.check_id(parent.id)}{SUFFIX}"))
        if chain[-1].digest != parent.digest:
            raise damaged(chain[-1].path, 0, f"it is another than the one that {child.meta.id} goes on from")
        if (chain[-1].meta.layout, chain[-1].meta.seed) != (child.meta.layout, child.meta.seed):
            raise damaged(chain[-1].path, 0, f"it is of another VM than {child.meta.id}, which goes on from it")
    return chain


class SnapshotStore:
    """The pages of the snapshot ``name`` in ``directory``; a :class:`~outboard.stores.store.Store` to read from.

    ``where`` and ``locators`` say of each page of the guest where it is at first: ZERO or SNAPSHOT. ``bases``: of each
    file of the chain the number of its first row.

    :raise NotFoundError, RefusedError: as :func:`open_chain`; ``no-zstd``: this host cannot unpack it;
        ``image-changed``: an image that blocks are taken from is not what it was.
    :raise KernelError: a file cannot be opened.

    Synchronization: any thread fetches.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.chain = open_chain(directory, name)
        self._lock = threading.Lock()
        self._fetched = 0
        self._contexts: list[int] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._fds: list[int] = []
            self.bases: list[int] = []
            self._block_bases: list[int] = []
            parts = [self._open(contents) for contents in self.chain]
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            self.where, self.locators, digests = self._resolve()
            columns[5][self._blocks] = digests
            members = np.full((columns[0].size, CHUNK_PAGES), -1, dtype=np.int64)
            away = np.flatnonzero(self.where == Where.SNAPSHOT)[::-1]
            places = self.locators[away].astype(np.int64)
            # Of pages with the same content the first one.
            members[places >> SLOT_BITS, places & _SLOTS] = away
            seed = np.array([self.chain[0].meta.seed], dtype=np.uint64)
            self.rows = Rows(columns[0], columns[1], columns[2], columns[3], columns[4], columns[5], members, seed)
            self._desk = self.desk()
            undo.pop_all()

    def _open(self, contents: Contents) -> tuple[NDArray[np.generic], ...]:
        """The rows of one file: its chunks, then its blocks."""
        chunks, table = contents.chunks, contents.table
        self._fds.append(_open(contents.path))
        file = self._fds[-1]
        images = []
        for image in contents.meta.images:
            self._fds.append(_open_image(image, contents.meta.id))
            images.append(self._fds[-1])
        blocks = table.block_images.size
        base = self._next
        self.bases.append(base)
        self._block_bases.append(base + chunks.offsets.size)
        return (
            np.concatenate(
                (np.full(chunks.offsets.size, file), np.array(images, dtype=np.int64)[table.block_images])
            ).astype(np.int32),
            np.concatenate((chunks.offsets, table.block_offsets)).astype(np.int64),
            np.concatenate((chunks.lengths.astype(np.int64), np.full(blocks, PAGE_SIZE))),
            np.concatenate((chunks.pages.astype(np.int64), np.ones(blocks, dtype=np.int64))),
            np.concatenate((chunks.codecs, np.full(blocks, Codec.RAW, dtype=np.uint8))),
            np.concatenate((chunks.digests, np.zeros(blocks, dtype=np.uint64))),
        )

    @property
    def _next(self) -> int:
        """The number of the first row of the file that is opened next."""
        done = self.chain[: len(self.bases)]
        return sum(one.chunks.offsets.size + one.table.block_images.size for one in done)

    def _resolve(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint64]]:
        """Follow each page to the file that has it; and the digests of the blocks' rows."""
        pages = self.chain[0].pages
        where = np.full(pages, Where.ZERO, dtype=np.uint8)
        locators = np.zeros(pages, dtype=np.uint64)
        rows: list[NDArray[np.int64]] = []
        digests: list[NDArray[np.uint64]] = []
        open_ = np.ones(pages, dtype=np.bool_)
        for contents, base, block_base in zip(self.chain, self.bases, self._block_bases, strict=True):
            table = contents.table
            here = open_ & (table.kinds == Kind.HERE)
            locators[here] = table.places[here] + np.uint64(base << SLOT_BITS)
            block = open_ & (table.kinds == Kind.DISK)
            locators[block] = (table.places[block] + np.uint64(block_base)) << np.uint64(SLOT_BITS)
            where[here | block] = Where.SNAPSHOT
            rows.append(table.places[block].astype(np.int64) + block_base)
            digests.append(table.digests[block, 0])
            open_ &= table.kinds == Kind.PARENT
        self._blocks = np.concatenate(rows)
        return where, locators, np.concatenate(digests)

    def desk(self) -> Desk:
        """What one more thread unpacks with, until the store is closed."""
        context = zstd.make_context()
        self._contexts.append(context)
        return Desk(
            np.empty(_CHUNK, dtype=np.uint8),
            np.empty(_CHUNK, dtype=np.uint8),
            np.array([-1, context], dtype=np.int64),
            np.zeros(self.rows.offsets.size + 1, dtype=np.int64),
        )

    def put(self, content: NDArray[np.uint8], digests: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:  # noqa: ARG002  # the other stores' signature
        """Nothing is put into a snapshot.

        :raise RefusedError: ``snapshot``.
        """
        raise RefusedError("snapshot", f"{content.size // PAGE_SIZE} pages were to be put into a snapshot")

    def fetch(self, locators: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        """See :meth:`~outboard.stores.store.Store.fetch`."""
        with self._lock:
            wrong = _fetch(self.rows, self._desk, np.ascontiguousarray(locators), into)
            self._fetched += locators.size if wrong < 0 else 0
        if wrong >= 0:
            row = int(locators[wrong]) >> SLOT_BITS
            raise DamagedPageError(
                f"{self.path_of(row)} does not hold what was written, in the {self.rows.lengths[row]} bytes from byte "
                f"{self.rows.offsets[row]} on"
            )

    def path_of(self, row: int) -> str:
        """The file that a row is in."""
        return os.fspath(Path(f"/proc/self/fd/{self.rows.files[row]}").readlink())

    def drop(self, locators: NDArray[np.uint64]) -> None:
        """Nothing is dropped from a snapshot."""

    def retain(self, locators: NDArray[np.uint64]) -> None:
        """Nothing is dropped from a snapshot."""

    def statistics(self) -> StoreStatistics:
        """A frozen snapshot."""
        pages = self.where.size
        return StoreStatistics(int(np.count_nonzero(self.where == Where.SNAPSHOT)), pages, 0, self._fetched)

    def close(self) -> None:
        """Idempotent; the files stay."""
        for fd in self._fds:
            os.close(fd)
        for context in self._contexts:
            zstd.free_context(context)
        self._fds, self._contexts = [], []


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise KernelError(f"open of the snapshot {path}", error.errno or errno.EIO) from error


def _open_image(image: snapshot_format.Image, name: str) -> int:
    try:
        fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {image.path}, from which {name} takes pages") from error
    except OSError as error:
        raise KernelError(f"open of {image.path}, from which {name} takes pages", error.errno or errno.EIO) from error
    now = os.fstat(fd)
    if (now.st_size, now.st_mtime_ns) != (image.size, image.modified):
        os.close(fd)
        raise RefusedError(
            "image-changed",
            f"{image.path} was written since {name} was taken, which has pages in it: they are lost with its blocks",
        )
    return fd
