"""The disk store: pages that equal a block of the VM's disk, and are read from there.

Nothing is ever put into it: a page is here because an image holds its content already. Its locator is the number of the
image among :class:`~outboard.stores.images.images.Images` and the number of the block in that file. Beside it belongs
the digest of the page, kept by whoever keeps the locator: blocks are many pages', and an image is not ours to mark. A
block that does not have that digest any more is not given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from outboard.errors import DamagedPageError
from outboard.linux import native
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digest
from outboard.stores.images.files import ImageFile
from outboard.stores.images.index import LayerIndex

NONE = 0xFFFF
"""The image of a page that no image holds."""
IMAGE_SHIFT = 48
_WORDS = PAGE_SIZE // 8
_BLOCK = np.uint64((1 << IMAGE_SHIFT) - 1)
_U1, _U2, _U4, _U8, _I4 = types.uint8[::1], types.uint16[::1], types.uint32[::1], types.uint64[::1], types.int32[::1]


def locators(image: NDArray[np.uint16], block: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The locators of blocks."""
    return (image.astype(np.uint64) << np.uint64(IMAGE_SHIFT)) | (block & _BLOCK)


def images_of(found: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """The images of locators."""
    return (found >> np.uint64(IMAGE_SHIFT)).astype(np.uint16)


def blocks_of(found: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The blocks of locators."""
    return found & _BLOCK


@njit(types.void(_I4, _U8), cache=True, nogil=True)
def _ask_ahead(files: NDArray[np.int32], found: NDArray[np.uint64]) -> None:
    """Have the kernel begin to read blocks: from a disk it takes many in a fifth of the time of one after another.

    Blocks that lie side by side are asked for as one; of those in the page cache it costs half a microsecond.
    """
    at = 0
    while at < found.size:
        begin, end = found[at], found[at] + np.uint64(1)
        at += 1
        while at < found.size and (found[at] == end or found[at] + np.uint64(1) == begin):
            begin, end = min(begin, found[at]), max(end, found[at] + np.uint64(1))
            at += 1
        image = np.int64(begin >> np.uint64(IMAGE_SHIFT))
        if image < files.size:
            offset = int(np.int64(begin & _BLOCK)) * PAGE_SIZE
            length = int(np.int64(end - begin)) * PAGE_SIZE
            native.posix_fadvise(files[image], offset, length, native.POSIX_FADV_WILLNEED)


@njit(
    types.void(types.boolean[::1], _U8, _U8, _U4, _U4, types.int64, types.int32, types.int64[::1]),
    cache=True,
    nogil=True,
)
def _look_up(
    open_: NDArray[np.bool_],
    digests: NDArray[np.uint64],
    keys: NDArray[np.uint64],
    blocks: NDArray[np.uint32],
    table: NDArray[np.uint32],
    shift: int,
    fd: int,
    entries: NDArray[np.int64],
) -> None:
    """Find the entries of those of the pages that are still open in one index, else -1; their blocks are asked for."""
    wanted = np.empty(digests.size, dtype=np.uint64)
    count = 0
    for page in range(digests.size):
        entries[page] = -1
        if not open_[page]:
            continue
        key = digests[page]
        bucket = np.int64(key >> np.uint64(shift))
        at = np.int64(table[bucket])
        end = np.int64(table[bucket + 1])
        while at < end and keys[at] < key:
            at += 1
        if at < end and keys[at] == key:
            entries[page] = at
            wanted[count] = blocks[at]
            count += 1
    if count > 1:
        files = np.empty(1, dtype=np.int32)
        files[0] = fd
        _ask_ahead(files, wanted[:count])


@njit(
    types.int64(_U8, types.boolean[::1], types.int64[::1], _U4, types.int32, _U8, types.uint16, _U2, _U8),
    cache=True,
    nogil=True,
)
def _compare(
    words: NDArray[np.uint64],
    open_: NDArray[np.bool_],
    entries: NDArray[np.int64],
    blocks: NDArray[np.uint32],
    fd: int,
    room: NDArray[np.uint64],
    image: int,
    out_image: NDArray[np.uint16],
    out_block: NDArray[np.uint64],
) -> int:
    """See which pages are what their entries say; how many entries have turned out to be old."""
    old = 0
    for page in range(entries.size):
        at = entries[page]
        if at < 0:
            continue
        got = native.pread(fd, room.ctypes.data, PAGE_SIZE, int(np.int64(blocks[at])) * PAGE_SIZE)
        same = got == PAGE_SIZE
        if same:
            base = page * _WORDS
            for word in range(_WORDS):
                if room[word] != words[base + word]:
                    same = False
                    break
        if not same:
            old += 1
            continue
        open_[page] = False
        out_image[page] = image
        out_block[page] = blocks[at]
    return old


@njit(types.void(_I4, _U8, _U8, _U1, types.boolean[::1]), cache=True, nogil=True)
def _fetch(
    files: NDArray[np.int32],
    found: NDArray[np.uint64],
    digests: NDArray[np.uint64],
    into: NDArray[np.uint8],
    sound: NDArray[np.bool_],
) -> None:
    if found.size > 1:
        _ask_ahead(files, found)
    for index in range(found.size):
        image = np.int64(found[index] >> np.uint64(IMAGE_SHIFT))
        address = into.ctypes.data + index * PAGE_SIZE
        sound[index] = False
        if image < files.size:
            offset = int(np.int64(found[index] & _BLOCK)) * PAGE_SIZE
            got = native.pread(files[image], address, PAGE_SIZE, offset)
            sound[index] = got == PAGE_SIZE and page_digest(address) == digests[index]


class DiskStore:
    """The blocks of image files, which stay somebody else's to close.

    :param images: by number; None: that one cannot be had.

    ``files`` (int32) are their descriptors, for compiled loops.

    Synchronization: any thread and any forked process.
    """

    def __init__(self, images: Sequence[ImageFile | None]) -> None:
        self._images = images
        self.files: NDArray[np.int32] = np.array([-1 if one is None else one.fileno() for one in images], np.int32)

    def read(
        self, found: NDArray[np.uint64], digests: NDArray[np.uint64], into: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Read blocks into ``into``, one after the other; of each whether it has its digest. Else it is not to be used.

        :param found: locators, whoever has said them.
        """
        sound = np.empty(found.size, dtype=np.bool_)
        _fetch(self.files, found, digests, into, sound)
        return sound

    def fetch(self, found: NDArray[np.uint64], digests: NDArray[np.uint64], into: NDArray[np.uint8]) -> None:
        """Read blocks, all of them.

        :raise DamagedPageError: one is not what it was; nothing of ``into`` may be used.
        """
        wrong = np.flatnonzero(~self.read(found, digests, into))
        if wrong.size:
            image, block = int(images_of(found[wrong])[0]), int(blocks_of(found[wrong])[0])
            file = self._images[image] if image < len(self._images) else None
            name = f"image {image}, which is not open" if file is None else file.path
            raise DamagedPageError(
                f"{wrong.size} of {found.size} blocks of disks are not what they were, the first is block {block} of "
                f"{name} (byte {block * PAGE_SIZE})"
            )


class Finder:
    """Finds pages in images by their content.

    :param images: by number. :param indexes: of each; None, which may change: that one is not looked in.
    :ivar old: entries that turned out to be of blocks that have changed since.

    Synchronization: any thread; ``old`` may miss some when several find.
    """

    def __init__(self, images: Sequence[ImageFile | None], indexes: list[LayerIndex | None]) -> None:
        self._images = images
        self.indexes = indexes
        self.old = 0

    def find(
        self, content: NDArray[np.uint8], digests: NDArray[np.uint64], skip: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
        """The image and the block of each page, every byte compared; image NONE where there is none.

        :param content: whole pages; :param digests: of each. :param skip: those not to be looked for.
        """
        room: NDArray[np.uint64] = np.empty(_WORDS, dtype=np.uint64)
        open_ = np.ones(digests.size, dtype=np.bool_) if skip is None else ~skip
        image: NDArray[np.uint16] = np.full(digests.size, NONE, dtype=np.uint16)
        block: NDArray[np.uint64] = np.zeros(digests.size, dtype=np.uint64)
        for number, file, index in self._indexed():
            entries = self._look_up(file, index, open_, digests)
            self.old += _compare(
                content.view(np.uint64), open_, entries, index.blocks, file.fileno(), room, number, image, block
            )
        return image, block

    def ask_ahead(self, digests: NDArray[np.uint64], skip: NDArray[np.bool_]) -> None:
        """Have the kernel begin to read what :meth:`find` will compare pages of these digests with."""
        for _, file, index in self._indexed():
            self._look_up(file, index, ~skip, digests)

    def _indexed(self) -> Iterator[tuple[int, ImageFile, LayerIndex]]:
        for number, index in enumerate(self.indexes):
            file = self._images[number]
            if file is not None and index is not None and index.keys.size:
                yield number, file, index

    @staticmethod
    def _look_up(
        file: ImageFile, index: LayerIndex, open_: NDArray[np.bool_], digests: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        entries: NDArray[np.int64] = np.empty(digests.size, dtype=np.int64)
        _look_up(open_, digests, index.keys, index.blocks, index.table, index.shift, file.fileno(), entries)
        return entries
