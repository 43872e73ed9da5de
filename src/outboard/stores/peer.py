"""The peer store: pages that are still in the memory of the host the guest came from.

A page is asked for once, on a stream that carries nothing else, and arrives either as the answer or, when the bulk was
already carrying it, by the bulk: the peer never sends a page twice for being asked.
"""

from __future__ import annotations

import time

from outboard.errors import PeerError
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind, Pages


class PeerStore:
    """The asking end of the urgent stream.

    Until :meth:`open` requests are held: the peer's memory is not final before its guest has stopped.

    Synchronization: one process uses it.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._asked: dict[int, int] = {}
        self._held: list[int] | None = []

    def open(self) -> None:
        """The peer's memory is final: send what was held, and hold nothing from now on."""
        held, self._held = self._held, None
        if held:
            self.channel.send_request(held)

    def ask(self, pages: list[int]) -> None:
        """Ask for pages; those already asked for are not asked again."""
        now = time.monotonic_ns()
        new = [page for page in dict.fromkeys(pages) if page not in self._asked]
        for page in new:
            self._asked[page] = now
        if self._held is not None:
            self._held.extend(new)
        elif new:
            self.channel.send_request(new)

    def arrived(self, page: int) -> int | None:
        """Nanoseconds since ``page`` was asked for, by whichever way it came; None when nobody asks for it now."""
        asked = self._asked.pop(page, None)
        return None if asked is None else time.monotonic_ns() - asked

    def receive(self) -> Pages:
        """The next answer.

        :raise PeerError: the peer sent something else.
        :raise UnreachableError: the stream ended.
        """
        frame = self.channel.receive()
        if frame.kind is not Kind.PAGES:
            raise PeerError(f"an answer to a page fault came as {frame.kind.name}, not PAGES")
        return self.channel.pages(frame)
