"""The peer store: pages that are still in the memory of the host the guest came from.

A page is asked for once, on a stream that carries nothing else, and arrives either as the answer or, when the bulk was
already carrying it, by the bulk: the peer never sends a page twice for being asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from outboard.errors import UnreachableError
from outboard.pages.pageset import Runs
from outboard.wire.channel import Channel
from outboard.wire.urgent import Asking


class PeerStore:
    """The asking end of the urgent stream.

    Until :meth:`open` requests are held: the peer's memory is not final before its guest has stopped. Without a channel
    they are held for whoever comes after us.

    Synchronization: one process uses it.
    """

    def __init__(self, channel: Channel | None) -> None:
        self._stream = None if channel is None else Asking(channel)
        self._asked: dict[int, int] = {}
        self._held: list[int] | None = []

    def fileno(self) -> int:
        """Readable when an answer has come; -1 without a channel."""
        return -1 if self._stream is None else self._stream.fileno()

    def open(self) -> None:
        """The peer's memory is final: send what was held, and hold nothing from now on."""
        if self._stream is None:
            raise UnreachableError("there is no peer to open")
        held, self._held = self._held, None
        if held:
            self._stream.ask(held)

    def lost(self) -> None:
        """The peer is gone for now: hold what is asked for. Whoever comes after us asks anew."""
        self._held = []

    def ask(self, pages: list[int]) -> None:
        """Ask for pages; those already asked for are not asked again."""
        now = time.monotonic_ns()
        new = []
        for page in pages:
            if page not in self._asked:
                self._asked[page] = now
                new.append(page)
        if self._held is not None or self._stream is None:
            self._held = [*(self._held or ()), *new]
        elif new:
            self._stream.ask(new)

    def arrived(self, page: int) -> int | None:
        """Nanoseconds since ``page`` was asked for, by whichever way it came; None when nobody asks for it now."""
        asked = self._asked.pop(page, None)
        return None if asked is None else time.monotonic_ns() - asked

    def fetched(self) -> Iterator[tuple[int, int | None]]:
        """What has come, as :meth:`outboard.wire.urgent.Asking.answers`."""
        return iter(()) if self._stream is None else self._stream.answers()

    def fetched_whole(self) -> Iterator[tuple[Runs, NDArray[np.bool_], NDArray[np.uint8]]]:
        """What has come, several pages at a time, as :meth:`outboard.wire.urgent.Asking.frames`."""
        return iter(()) if self._stream is None else self._stream.frames()
