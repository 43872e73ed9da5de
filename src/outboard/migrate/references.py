"""Pages that go as references to blocks of the VM's disks, where both hosts have the image: the source's side.

Only images that nobody writes to are referred to (:attr:`outboard.stores.images.layers.Layer.fixed`). The destination
must not read the others before its QEMU owns them: what is in its page cache then, that QEMU would read later.

A page is looked for when it is about to be sent, so nothing has to be kept true meanwhile: its content is in hand, and
every byte of it is compared with the block. The destination reads the block and compares the digest; what it does not
find it asks for when the source wants to know, which is before each barrier and every few thousand references.

Looking costs the migration at most a twentieth of its time beyond what it gains. What a reference gains is the time
that its page would have taken the wire, as pages like it pack. What it costs is time of the processor, where that has
none to spare, and waiting for a disk, here and at the destination, which says how long it took to read. Who has lost
more than that looks on when so much time has passed that it is a twentieth again. Nothing is looked for any more where
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
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outboard.errors import OutboardError
from outboard.linux import proc
from outboard.migrate.messages import Images as Asked
from outboard.migrate.messages import ImagesSeen
from outboard.pages import PAGE_SIZE
from outboard.pages.content import page_digests, zero_pages
from outboard.pages.shared import shared_array
from outboard.stores import disk
from outboard.stores.disk import Finder
from outboard.stores.images import index
from outboard.stores.images.images import Images
from outboard.stores.images.layers import DiskSpec
from outboard.stores.images.sampling import sample

_ASK_FIRST, _ASK_EVERY = 512, 4096
"""References after which the source wants to know which could not be read: at first, for a disk may be slow; later."""
_MOST_ASKED = 1 / 8
_LOSS = 0.05
"""How much of the time may be lost by looking."""
_AHEAD_NS = 20_000_000
"""How much may be lost before that is so; also how long gains count."""
_SENDING_NS = PAGE_SIZE / 1.3
"""What sending a page takes where the link is not the limit: TLS does some 1.3 GB/s."""
_COLD = 8
"""Batches whose blocks are asked for ahead after one was read from a disk."""
_SAMPLE_EVERY, _NEW = 4, 0.5
"""Batches in which something was found, of which one is packed in part to see what it would have come to; and how much
of the estimate comes from the newest."""


class Wire(Protocol):
    """What is to be seen of :class:`outboard.migrate.codec.Choice`."""

    @property
    def waits(self) -> bool:
        """Whether the processor has time to spare."""

    @property
    def whole_ns(self) -> float:
        """What a page as it is takes of the wire."""

    def packs_to(self, pages: NDArray[np.uint8]) -> float:
        """What pages would come to, as a share of themselves."""


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
                # One that is damaged is not tried again.
                self._made[number] = finder.indexes[number] is not None
            complete &= finder.indexes[number] is not None
        return complete


def _disk_reads() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


class Lookup:
    """Looks for the pages of one stream on the disks, while that pays.

    :param clock: nanoseconds, monotonic. :param processor: nanoseconds of processor time of this thread.
    :param queued: nanoseconds that this thread has waited for a processor. :param disk_reads: how many sectors it has
        had read from disks, as getrusage(2) counts.
    """

    def __init__(
        self,
        references: References,
        clock: Callable[[], int] = time.monotonic_ns,
        processor: Callable[[], int] = time.thread_time_ns,
        queued: Callable[[], int] = proc.queued_ns,
        disk_reads: Callable[[], int] = _disk_reads,
    ) -> None:
        self._references, self._clock, self._processor = references, clock, processor
        self._queued, self._disk_reads = queued, disk_reads
        self._finder = references.finder() if references.wanted else None
        self._complete = False
        self._credit, self._counted = float(_AHEAD_NS), clock()
        self._ratio, self._sampled = 1.0, 0
        self._open_ns, self._asking_ns = 0.0, 0
        self._ask_at = _ASK_FIRST
        self._cold = _COLD
        self.open = 0
        """References since the destination was asked last."""

    @property
    def due(self) -> bool:
        """Whether the destination is to be asked."""
        return self.open >= self._ask_at

    @property
    def cold(self) -> bool:
        """Whether blocks may be on a disk alone, and pages are looked for: :meth:`ask_ahead` then."""
        return self._cold > 0 and self._credit >= 0 and self._finder is not None

    def ask_ahead(self, pages: NDArray[np.uint8]) -> None:
        """Have the kernel begin to read what pages that will be looked for soon may equal; a row each."""
        if self._finder is not None:
            used, read = self._processor(), self._disk_reads()
            content = pages.reshape(-1)
            self._finder.ask_ahead(page_digests(content), zero_pages(content))
            self._cold = self._cold - 1 if self._disk_reads() == read else _COLD
            self._asking_ns += self._processor() - used

    def blocks(self, pages: NDArray[np.uint8], wanted: NDArray[np.bool_], wire: Wire) -> NDArray[np.uint64] | None:
        """Look for pages; a row of locator and digest for each, the digest 0 where there is none; None: not now.

        :param pages: a row of PAGE_SIZE bytes each, contiguous. :param wanted: which to look for.
        """
        finder = self._finder
        if finder is None:
            return None
        began = self._clock()
        self._earn(_LOSS * (began - self._counted))
        self._counted = began
        if self._credit < 0:
            return None
        if not self._complete:
            # At each batch: a gigabit link carries a small guest within a second.
            self._complete = self._references.renew(finder)
        if not any(one is not None for one in finder.indexes):
            return None
        began, used, queued, read = self._clock(), self._processor(), self._queued(), self._disk_reads()
        content = pages.reshape(-1)
        digests = page_digests(content)
        image, block = finder.find(content, digests, ~wanted)
        found = image != disk.NONE
        self._counted, used = self._clock(), self._processor() - used
        waited = 0
        if self._disk_reads() != read:
            # Not what the scheduler let others go first.
            waited = max(0, self._counted - began - used - (self._queued() - queued))
            self._cold = _COLD
        used, self._asking_ns = used + self._asking_ns, 0
        gain = self._gain(pages[found], wire)
        self._earn(gain - waited - (0 if wire.waits else used))
        self._open_ns += gain
        self.open += int(np.count_nonzero(found))
        rows: NDArray[np.uint64] = np.zeros((len(pages), 2), dtype=np.uint64)
        rows[found, 0], rows[found, 1] = disk.locators(image[found], block[found]), digests[found]
        return rows

    def _gain(self, found: NDArray[np.uint8], wire: Wire) -> float:
        """What sending pages would take, in nanoseconds."""
        if not len(found):
            return 0.0
        if self._sampled % _SAMPLE_EVERY == 0:
            self._ratio += _NEW * (wire.packs_to(found) - self._ratio)
        self._sampled += 1
        return len(found) * max(_SENDING_NS, wire.whole_ns * self._ratio)

    def _earn(self, ns: float) -> None:
        self._credit = min(_AHEAD_NS, self._credit + ns)

    def asked(self, pages: int, read_ns: int) -> None:
        """The destination has asked for so many of the pages that went as references; reading those took it so long."""
        if pages > _MOST_ASKED * self.open:
            self._finder = None
        # What it takes less than the pages would have is gained already.
        self._earn(min(0.0, self._open_ns - read_ns))
        self._open_ns, self.open, self._ask_at = 0.0, 0, _ASK_EVERY
