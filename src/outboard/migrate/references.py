"""Pages that go as references to blocks of the VM's disks, where both hosts have the image: the source's side.

Only images that nobody writes to are referred to (:attr:`outboard.stores.images.layers.Layer.fixed`). The destination
must not read the others before its QEMU owns them: what is in its page cache then, that QEMU would read later.

A page is looked for when it is about to be sent, so nothing has to be kept true meanwhile: its content is in hand, and
every byte of it is compared with the block. The destination reads the block and compares the digest; what it does not
find it asks for when the source wants to know, which is before each barrier and every few thousand references.
Looking stops where it does not pay: where few pages are found, where finding one takes longer than sending it, or where
the destination keeps asking.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outboard.errors import OutboardError
from outboard.migrate.messages import Images as Asked
from outboard.migrate.messages import ImagesSeen
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests
from outboard.pages.shared import shared_array
from outboard.stores import disk
from outboard.stores.disk import Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images
from outboard.stores.images.layers import DiskSpec
from outboard.stores.images.sampling import sample

ASK_EVERY = 4096
"""References after which the source wants to know which could not be read."""
_MOST_ASKED = 1 / 8
_LOOK, _WORTH = 1024, 32
"""Pages to look for before it is judged, and one in how many must have been found to be more than few."""
_LOSS = 0.1
"""How much of the time of sending pages whole may be lost by looking for them."""
_FEW, _SLOW = 1024, 16384
"""Pages not looked for after too much was lost: where few were found, and where finding them takes long."""
_SENDING_NS = PAGE_SIZE / 1.3
"""What sending a page takes where the link is not the limit: TLS does some 1.3 GB/s."""
_SECTORS, _COLD = PAGE_SIZE // 512, 0.25
"""Of a page; and which part of the pages that were found must have come from the disk for it to be slow."""
_LATER_S = 0.2
"""Between two looks for an index that is being made."""


class References:
    """What is known of the images of ``disks``, in memory shared with the senders.

    :param indexes: the directory of the images' indexes. :param enabled: as the user asked.

    Synchronization: made before the senders are forked; the main process changes it, they read.
    """

    def __init__(self, disks: Sequence[DiskSpec], indexes: Path, *, enabled: bool) -> None:
        self._images = Images(disks if enabled else ())
        self._indexes = indexes
        layers = self._images.layers
        self._fixed = [layer.fixed for layer in layers]
        self._nonce = secrets.token_hex(16)
        self._agreed: NDArray[np.uint8] = shared_array(max(1, len(layers)), np.uint8)
        self._made: NDArray[np.uint8] = shared_array(max(1, len(layers)), np.uint8)
        for number, layer in enumerate(layers):
            self._made[number] = layer.fixed and index.is_there(layer, indexes)
        self.words = "not looked for"
        if enabled and not any(self._fixed):
            self.words = "none: the VM has no disk image that nobody writes to"

    @property
    def wanted(self) -> bool:
        """Whether there is an image that could be referred to."""
        return any(self._fixed)

    @property
    def lacks_indexes(self) -> bool:
        """Whether there is something for :meth:`make_indexes` to do."""
        return any(fixed and not made for fixed, made in zip(self._fixed, self._made, strict=False))

    def close(self) -> None:
        """Idempotent."""
        self._images.close()

    def make_indexes(self) -> None:
        """Make the indexes that lack; for a process of its own, whose priority is lowered."""
        os.nice(19)
        for number, layer in enumerate(self._images.layers):
            if layer.fixed:
                # What cannot be indexed is not referred to.
                with contextlib.suppress(OutboardError):
                    index.open_index(layer, self._indexes)
                    self._made[number] = 1

    def ask(self) -> Asked:
        """The question for the destination."""
        return Asked(self._nonce)

    def answered(self, seen: ImagesSeen) -> None:
        """Take the destination's answer."""
        same = []
        for number, layer in enumerate(self._images.layers):
            theirs = seen.digests[number] if number < len(seen.digests) else ""
            if layer.fixed and theirs and theirs == sample(layer.file, self._nonce):
                self._agreed[number] = 1
                same.append(str(layer.path))
        self.words = f"in {', '.join(same)}" if same else "none: the destination does not have the same disk images"

    def finder(self) -> Finder:
        """A finder for one sender; see :meth:`renew`."""
        files = self._images.files
        return Finder(files, [None] * len(files))

    def renew(self, finder: Finder) -> bool:
        """Give a finder the indexes of the images that both hosts have, as far as they are there; whether all are."""
        complete = True
        for number, layer in enumerate(self._images.layers):
            if not self._fixed[number] or finder.indexes[number] is not None:
                continue
            if self._agreed[number] and self._made[number]:
                finder.indexes[number] = index.load(layer, self._indexes)
            complete &= finder.indexes[number] is not None
        return complete


def _disk_reads() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


class Lookup:
    """Looks for the pages of one stream on the disks, while that pays.

    :param clock: nanoseconds, monotonic. :param processor: nanoseconds of processor time of this thread.
    :param disk_reads: how many sectors this thread has had to wait for so far, as getrusage(2) counts.
    """

    def __init__(
        self,
        references: References,
        clock: Callable[[], int] = time.monotonic_ns,
        processor: Callable[[], int] = time.thread_time_ns,
        disk_reads: Callable[[], int] = _disk_reads,
    ) -> None:
        self._references, self._clock, self._processor, self._disk_reads = references, clock, processor, disk_reads
        self._finder = references.finder() if references.wanted else None
        self._complete = False
        self._renewed = -1_000_000_000
        self._looked = self._found = self._took_ns = self._used_ns = self._resting = 0
        self._read = 0
        self.open = 0
        """References since the destination was asked last."""

    def blocks(
        self, pages: NDArray[np.uint8], wanted: NDArray[np.bool_], page_ns: float, *, spare: bool
    ) -> NDArray[np.uint64] | None:
        """Look for pages; a row of locator and digest for each, the digest 0 where there is none; None: not now.

        :param pages: a row of PAGE_SIZE bytes each, contiguous. :param wanted: which to look for.
        :param page_ns: what sending one takes the wire. :param spare: whether the processor has time to spare.
        """
        finder = self._finder
        if finder is None:
            return None
        if self._resting > 0:
            self._resting -= len(pages)
            return None
        if not self._complete and self._clock() - self._renewed > _LATER_S * 1e9:
            self._complete = self._references.renew(finder)
            self._renewed = self._clock()
        if not any(one is not None for one in finder.indexes):
            return None
        began, used, read = self._clock(), self._processor(), self._disk_reads()
        content = pages.reshape(-1)
        digests = page_digests(content)
        image, block = finder.find(content, digests, ~wanted)
        found = image != disk.NONE
        self._took_ns += self._clock() - began
        self._used_ns += self._processor() - used
        self._read += self._disk_reads() - read
        looked, met = int(np.count_nonzero(wanted)), int(np.count_nonzero(found))
        self._note(looked, met, max(page_ns, _SENDING_NS), spare=spare)
        rows: NDArray[np.uint64] = np.zeros((len(pages), 2), dtype=np.uint64)
        rows[found, 0], rows[found, 1] = disk.locators(image[found], block[found]), digests[found]
        return rows

    def _note(self, looked: int, found: int, whole_ns: float, *, spare: bool) -> None:
        self._looked += looked
        self._found += found
        if self._looked < _LOOK:
            return
        if self._found * _WORTH < self._looked:
            if not spare and self._used_ns > _LOSS * self._looked * whole_ns:
                self._resting = _FEW
        elif self._read > _SECTORS * _COLD * self._found and self._took_ns > self._found * whole_ns:
            # Were it not for the disk, it would be the scheduler that lets others go first.
            self._resting = _SLOW
        self._looked = self._found = self._took_ns = self._used_ns = self._read = 0

    def asked(self, pages: int) -> None:
        """The destination has asked for so many of the pages that went as references."""
        if pages > _MOST_ASKED * self.open:
            self._finder = None
        self.open = 0
