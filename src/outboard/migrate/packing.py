"""The content of the bulk's batches, on its way to the wire in as few bytes as pay.

A page goes, in this order: as a bit, when it is all zeros; as a reference to a block of a disk image that both hosts
have (:mod:`outboard.migrate.references`); as what has changed of it, when it was sent before and that
is less than pages come to now; as a reference, when a page with its content was sent lately and kept; and else whole,
packed with the others of its batch by the codec that :mod:`outboard.migrate.codec` chooses. References and changes are
looked for only while the wire is what the bulk waits for, and references only as long as they are found.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from outboard.migrate.codec import Choice, Compress
from outboard.migrate.outbox import ALL, Outbox, Share
from outboard.migrate.references import Lookup
from outboard.migrate.versions import UNKNOWN, Versions
from outboard.pages import PAGE_SIZE
from outboard.pages.kept import KeptPages
from outboard.wire.channel import Channel
from outboard.wire.codecs import CODERS, LZ4, NONE, Octets
from outboard.wire.packed import SLOTS, Form, packed_frame

_LOOK, _WORTH, _PAUSE = 1024, 32, 16384
"""After so many pages of which less than one in _WORTH was kept already, so many are not looked up."""
_WORD, _HEAD = 11, 16
"""Bytes that LZ4 makes of a changed word among zeros, and of a page of zeros."""
_NO_SLOTS: NDArray[np.uint16] = np.empty(0, dtype=np.uint16)


class _Duplicates:
    """Looks for pages that were sent, while that finds any."""

    def __init__(self) -> None:
        self._kept = KeptPages(SLOTS)
        self._looked = self._found = self._resting = 0

    def meet(self, pages: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.bool_]] | None:
        """As :meth:`KeptPages.meet`; None: not now."""
        if self._resting > 0:
            self._resting -= len(pages)
            return None
        slots, same = self._kept.meet(pages)
        self._looked += len(pages)
        self._found += int(np.count_nonzero(same))
        if self._looked >= _LOOK:
            if self._found * _WORTH < self._looked:
                self._resting = _PAUSE
            self._looked = self._found = 0
        return slots, same


class Packer:
    """Sends batches on one stream.

    :param share: what this stream sends. :param lookup: finds pages on disks.
    :param processor: nanoseconds of processor time of this thread.

    Synchronization: the stream's sender.
    """

    def __init__(
        self,
        outbox: Outbox,
        channel: Channel,
        compress: Compress,
        share: Share = ALL,
        lookup: Lookup | None = None,
        processor: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._share = share
        self.lookup = lookup
        self._outbox, self._channel, self._processor = outbox, channel, processor
        self.choice = Choice(compress, time.monotonic_ns, processor)
        self.begin()
        self._duplicates: _Duplicates | None = None
        self._versions: Versions | None = None
        self.octets = self.content_bytes = 0
        """Sent so far: on the wire, and what the pages held, but those of zeros."""

    def begin(self) -> None:
        """A batch begins to be read."""
        self._began = time.monotonic_ns(), self._processor()

    def send(
        self,
        runs: list[tuple[int, int]],
        content: NDArray[np.uint8],
        zero: NDArray[np.bool_],
        *,
        changes: bool = False,
        by_block: bool = True,
    ) -> None:
        """Send pages, which were read since :meth:`begin`.

        :param runs: (first, count) each; :param content: of all of them; :param zero: which go as zeros.
        :param changes: whether the destination's memory holds what was sent last, and its guest does not run.
        :param by_block: whether pages may go as references to blocks.
        """
        zeros = int(np.count_nonzero(zero))
        pages = content.reshape(-1, PAGE_SIZE)
        began, spent = self._processor(), self.choice.spent_ns
        forms, changed, slots, blocks = self._look(runs, pages, zero, changes=changes, by_block=by_block)
        looked = self._processor() - began if self.choice.enabled else 0
        as_they_are = not (len(changed) or slots.size or blocks)
        if as_they_are:
            full = pages[~zero].reshape(-1) if zeros else content
        else:
            full = pages[(forms == Form.FULL) | (forms == Form.KEPT)].reshape(-1)
        coder, packed = self.choice.pack(full) if self.choice.enabled else (NONE, full.data)
        packing = looked + self.choice.spent_ns - spent
        began = self._processor()
        self.choice.note_work(len(content), time.monotonic_ns() - self._began[0], began - self._began[1], packing)
        if coder is NONE and as_they_are:
            sent = self._channel.send_pages(runs, zero, full.data)
        else:
            sent = self._channel.send_pieces(packed_frame(runs, forms, slots, coder.codec, packed, changed, blocks))
        self.choice.note_sending(sent, self._processor() - began)
        self.octets += sent
        self.content_bytes += PAGE_SIZE * (zero.size - zeros)
        stream = self._share.number
        self._outbox.count_bulk(zero.size - zeros, zeros, sent, stream)
        self._outbox.count_packed(
            len(packed) + len(changed), CODERS.index(coder), len(full) // PAGE_SIZE, packing, stream
        )
        if not as_they_are:
            same, change = (int(np.count_nonzero(forms == form)) for form in (Form.SAME, Form.CHANGED))
            self._outbox.count_told(same, change, stream)
            self._outbox.count_blocks(len(blocks) // 16, 0, stream)

    def _look(
        self,
        runs: list[tuple[int, int]],
        pages: NDArray[np.uint8],
        zero: NDArray[np.bool_],
        *,
        changes: bool,
        by_block: bool,
    ) -> tuple[NDArray[np.uint8], Octets, NDArray[np.uint16], bytes]:
        """Find what need not go whole: the forms of the pages, the changes as packed, the slots, and the blocks."""
        forms = np.where(zero, np.uint8(Form.ZERO), np.uint8(Form.FULL))
        blocks = self._blocks(pages, forms) if by_block else b""
        if not (changes and self.choice.saving_may_pay):
            # What is sent meanwhile is not noted.
            self._versions = None
        packed = self._changes(runs, pages, forms) if changes else b""
        return forms, packed, self._references(pages, forms), blocks

    def _blocks(self, pages: NDArray[np.uint8], forms: NDArray[np.uint8]) -> bytes:
        """Find the pages that go as blocks of disks; these, as they stand in the payload."""
        if self.lookup is None:
            return b""
        rows = self.lookup.blocks(pages, forms == Form.FULL, self.choice)
        if rows is None:
            return b""
        found = rows[:, 1] != 0
        forms[found] = Form.BLOCK
        told: bytes = rows[found].astype("<u8").tobytes()
        return told

    def _changes(self, runs: list[tuple[int, int]], pages: NDArray[np.uint8], forms: NDArray[np.uint8]) -> Octets:
        """Find the pages that go as what has changed of them; that, packed."""
        if not self.choice.saving_may_pay:
            return b""
        if self._versions is None:
            self._versions = Versions(self._outbox.pages, self._share.of)
        numbers = np.concatenate([np.arange(first, first + count) for first, count in runs])
        full = forms == Form.FULL
        self._versions.drop(numbers[~full])
        if not full.any():
            return b""
        words, changes = self._versions.replace(numbers[full], pages[full])
        small = (words != UNKNOWN) & (words * _WORD + _HEAD < self.choice.ratio * PAGE_SIZE)
        if not small.any() or not self.choice.saving_pays:
            return b""
        forms[np.flatnonzero(full)[small]] = Form.CHANGED
        return LZ4.pack(changes[small].reshape(-1).data)

    def _references(self, pages: NDArray[np.uint8], forms: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Find the pages whose content was sent, and say which of the others are kept; the slots of both."""
        if not self.choice.saving_pays:
            return _NO_SLOTS
        full = np.flatnonzero(forms == Form.FULL)
        if self._duplicates is None:
            self._duplicates = _Duplicates()
        met = self._duplicates.meet(pages if full.size == len(pages) else pages[full]) if full.size else None
        if met is None:
            return _NO_SLOTS
        forms[full] = np.where(met[1], np.uint8(Form.SAME), np.uint8(Form.KEPT))
        return met[0]
