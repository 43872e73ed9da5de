"""What a guest's disks hold of its memory: pages that may be dropped, since they can be read there.

Only images that nobody writes to count (:attr:`outboard.stores.images.layers.Layer.fixed`), and of those only the ones
for which the kernel grants a lease: as long as it stands, nobody can have opened the image for writing. Who wants to is
made to wait, :meth:`OnDisk.disturbed` names the image, and its pages are brought back before the lease is given up.

In the journal's directory lie ``images.json``, which says what image each number means, and ``digests``, the digest of
each page that is away on a disk. An image keeps its number for as long as the guest is managed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outboard.errors import OutboardError
from outboard.pages.content import page_digests
from outboard.pages.shared import file_array
from outboard.stores import disk
from outboard.stores.disk import DiskStore, Finder
from outboard.stores.images import index
from outboard.stores.images.files import ImageFile
from outboard.stores.images.images import Images
from outboard.stores.images.index import LayerIndex
from outboard.stores.images.layers import DiskSpec

_IMAGES = "images.json"


class _Numbered(msgspec.Struct, frozen=True):
    """The image of a number."""

    path: str
    device: int
    inode: int


def _numbered(file: ImageFile) -> _Numbered:
    found = file.identity()
    return _Numbered(str(file.path), found.device, found.inode)


class OnDisk:
    """What ``disks`` hold of a guest of ``pages`` pages.

    :param indexes: a directory for the indexes of images; they are made in a thread of its own where they lack.
    :param journal: a directory that a successor is given too.
    :raise OutboardError: the journal cannot be read or kept.

    ``known`` (uint8) says of a page that it has been found on a disk, is write-protected, and has not been written
    since; ``digests`` is then its digest, as it is of a page that is away on a disk.

    Synchronization: one thread, beside whoever serves faults, who only sets bytes of ``known`` to 0.
    """

    def __init__(self, disks: Sequence[DiskSpec], indexes: Path, journal: Path, pages: int) -> None:
        self._images = Images(disks)
        self._old: list[ImageFile] = []
        self._disks, self._indexes = disks, indexes
        self.digests: NDArray[np.uint64] = file_array(journal / "digests", pages, np.uint64)
        self.known: NDArray[np.uint8] = np.zeros(pages, dtype=np.uint8)
        files = self._number(journal / _IMAGES)
        self.store = DiskStore(files)
        self.finder = Finder(files, [None] * len(files))
        self._files = files
        self._leased = self._lease()
        self._building = threading.Thread(target=self._build, daemon=True)
        if self._load():
            self._building.start()

    def _number(self, path: Path) -> list[ImageFile | None]:
        """The images by number, as those before us have numbered them; new ones behind."""
        try:
            known = msgspec.json.decode(path.read_bytes(), type=list[_Numbered])
        except FileNotFoundError:
            known = []
        except msgspec.DecodeError as error:
            raise OutboardError(f"{path} does not say which image is which ({error})") from error
        files: list[ImageFile | None] = [None] * len(known)
        before = len(known)
        for file in self._images.files:
            me = _numbered(file)
            if me in known:
                files[known.index(me)] = file
            else:
                known.append(me)
                files.append(file)
        for number, one in enumerate(known[:before]):
            if files[number] is None:
                files[number] = self._reopened(one)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_bytes(msgspec.json.encode(known))
        fresh.rename(path)
        return files

    def _reopened(self, one: _Numbered) -> ImageFile | None:
        """An image that is under none of the disks any more, and may have pages all the same."""
        with contextlib.suppress(OutboardError):
            file = ImageFile(Path(one.path))
            self._old.append(file)
            if _numbered(file) == one:
                return file
        return None

    def _lease(self) -> set[int]:
        return {
            self._files.index(layer.file)
            for layer in self._images.layers
            if layer.fixed and not layer.file.is_device and layer.file.lease()
        }

    def _load(self) -> bool:
        """Take the indexes that there are; whether some lack."""
        lacking = False
        for layer in self._images.layers:
            number = self._files.index(layer.file)
            if number in self._leased:
                self.finder.indexes[number] = index.load(layer, self._indexes)
                lacking |= self.finder.indexes[number] is None
        return lacking

    def _build(self) -> None:
        # Files of its own: ours may be closed meanwhile.
        with Images(self._disks) as images:
            for layer in images.layers:
                me = _numbered(layer.file)
                for number in self._leased:
                    file = self._files[number]
                    if self.finder.indexes[number] is None and file is not None and _numbered(file) == me:
                        with contextlib.suppress(OutboardError):
                            found: LayerIndex = index.open_index(layer, self._indexes)
                            self.finder.indexes[number] = found

    def await_indexes(self) -> None:
        """Wait until every index is there that can be."""
        if self._building.is_alive():
            self._building.join()

    def path_of(self, image: int) -> Path:
        """Where the image of a number is, in which something has been found."""
        file = self._files[image]
        if file is None:
            raise ValueError(f"image {image} is open no more")
        return file.path

    def look_up(
        self, numbers: NDArray[np.int64], content: NDArray[np.uint8], zero: NDArray[np.bool_]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """Which of some pages a disk holds, and the locators of these; their digests are noted.

        :param content: theirs; :param zero: those not to be looked for.
        """
        digests = page_digests(content)
        image, block = self.finder.find(content, digests, zero)
        found = image != disk.NONE
        self.digests[numbers[found]] = digests[found]
        return found, disk.locators(image[found], block[found])

    def disturbed(self) -> list[int]:
        """The images that somebody waits to write to, or could have written to since."""
        files = ((number, self._files[number]) for number in self._leased)
        return sorted(number for number, file in files if file is not None and not file.leased)

    def give_up(self, image: int) -> None:
        """Look in an image no longer, and let whoever waits write to it; its pages have been brought back."""
        self.finder.indexes[image] = None
        self._leased.discard(image)
        file = self._files[image]
        if file is not None:
            file.give_up_lease()

    def close(self) -> None:
        """Idempotent. Pages that are away stay so for a successor."""
        self._leased.clear()
        self._images.close()
        for file in self._old:
            file.close()
