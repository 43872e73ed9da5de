"""The urgent stream's two ends: one page a frame, both ways, without anything that is not needed for it.

The frames are those of :mod:`outboard.wire.frames`. What is special is the way to them: somebody's processor stands
still from the request to the page, and both ends have slept since the last one, so that every line of code and every
object that is touched has to come from memory. The usual frame is recognised as it lies in the buffer; any other takes
the decoder's way.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from outboard.errors import PeerError
from outboard.wire import frames
from outboard.wire.channel import Channel
from outboard.wire.frames import PAGE, Kind, Pages

_NUMBER = struct.Struct("<Q")
_ASKED = struct.Struct("<QQQ")
"""A request for one page: the header as two numbers, the page."""
_ONE = struct.Struct("<QQQQQB")
"""What comes before an answer's content: the header as two numbers, the counts as one, first page, pages, zero bit."""
_REQUEST = frames.header(Kind.REQUEST, 8)
_FULL = frames.pages_head([(0, 1)], np.zeros(1, dtype=np.bool_))
_ZERO = frames.pages_head([(0, 1)], np.ones(1, dtype=np.bool_))
_REQUEST_WORDS = struct.unpack("<QQ", _REQUEST)
_FULL_WORDS = _ONE.unpack(_FULL)[:3]
_FIRST_AT = 24
_SIZE = len(_FULL) + PAGE
_ZEROS = bytes(PAGE)


class Asking:
    """The end that asks for pages.

    Synchronization: one process, one thread.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._request = bytearray(_REQUEST + bytes(8))

    def fileno(self) -> int:
        """Readable when an answer has come."""
        return self.channel.fileno()

    def ask(self, pages: list[int]) -> None:
        """Ask for pages."""
        if len(pages) == 1:
            _NUMBER.pack_into(self._request, len(_REQUEST), pages[0])
            self.channel.send_small(self._request)
        else:
            self.channel.send_request(pages)

    def answers(self) -> Iterator[tuple[int, int | None]]:
        """What has come: page number, and the address of its content in this process; None is a page of zeros.

        A content is good until the next is asked for.

        :raise PeerError: it is no answer. :raise UnreachableError: the stream ended.
        """
        channel = self.channel
        while True:
            raw = channel.untaken()
            page = self._one(raw)
            if page is None:
                yield from self._others()
            else:
                address = channel.address() + len(_FULL)
                channel.take(_SIZE)
                yield page, address
            if not channel.pending():
                return

    def _one(self, raw: memoryview) -> int | None:
        """The page of an answer that holds exactly one, with content; None is any other."""
        if len(raw) < _SIZE:
            return None
        head, check, counts, page, count, zero = _ONE.unpack_from(raw)
        usual = (head, check, counts) == _FULL_WORDS and count == 1 and not zero and page < self.channel.limit
        return int(page) if usual else None

    def frames(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint8]]]:
        """What has come, a frame at a time: runs of page numbers, which of them are zeros, the content of the others.

        For large pages, which come whole. Errors and the life of a content as for :meth:`answers`.
        """
        while True:
            pages = self._receive()
            yield np.array(pages.runs, dtype=np.int64), pages.zero, np.frombuffer(pages.data, dtype=np.uint8)
            if not self.channel.pending():
                return

    def _receive(self) -> Pages:
        frame = self.channel.receive()
        if frame.kind is not Kind.PAGES:
            raise PeerError(f"an answer to a page fault came as {frame.kind.name}, not PAGES")
        return self.channel.pages(frame)

    def _others(self) -> Iterator[tuple[int, int | None]]:
        pages = self._receive()
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages.data)) if len(pages.data) else 0
        for page, zero in zip(_numbers(pages.runs), pages.zero.tolist(), strict=True):
            yield page, None if zero else address
            address += 0 if zero else PAGE


class Answering:
    """The end that answers.

    Synchronization: one process, one thread.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        channel.take_over()
        self._answer = bytearray(_FULL + bytes(PAGE))
        self.page = memoryview(self._answer)[len(_FULL) :]
        """Where the content of the page to answer with goes."""

    def requests(self) -> tuple[int, ...]:
        """The next request; it waits for one without end.

        :raise PeerError: it is none. :raise UnreachableError: the stream ended.
        """
        raw = self.channel.untaken()
        if len(raw) == _ASKED.size:
            head, check, page = _ASKED.unpack_from(raw)
            if (head, check) == _REQUEST_WORDS and page < self.channel.limit:
                self.channel.take(_ASKED.size)
                return (page,)
        frame = self.channel.receive()
        if frame.kind is not Kind.REQUEST:
            raise PeerError(f"a page request came as {frame.kind.name}")
        return self.channel.requested(frame)

    def answer_whole(self, first: int, zero: NDArray[np.bool_], content: NDArray[np.uint8]) -> int:
        """Send a large page: which of its pages are zeros, and the others; bytes sent."""
        return self.channel.send_pages([(first, zero.size)], zero, content.data)

    def answer(self, page: int) -> int:
        """Send what is in :attr:`page`; bytes sent."""
        if self._answer.endswith(_ZEROS):
            head = bytearray(_ZERO)
            _NUMBER.pack_into(head, _FIRST_AT, page)
            self.channel.send_small(head)
            return len(head)
        _NUMBER.pack_into(self._answer, _FIRST_AT, page)
        self.channel.send_small(self._answer)
        return _SIZE


def _numbers(runs: list[tuple[int, int]]) -> Iterator[int]:
    for first, count in runs:
        yield from range(first, first + count)
