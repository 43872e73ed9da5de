"""The control stream of a migration: messages, page sets and QEMU's device state, in order."""

from __future__ import annotations

import threading

from outboard.migrate import messages
from outboard.migrate.messages import Message
from outboard.pages.pageset import PageSet
from outboard.wire.channel import Channel
from outboard.wire.frames import Frame

_PART = 1 << 16
"""Bytes of a bitmap in one frame: 2 GiB of guest. Where none of it is in the set nothing is sent."""


class Conversation:
    """One end of the control stream.

    Synchronization: any thread sends (device state is forwarded by one of its own), one receives.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message."""
        with self._sending:
            self.channel.send_message(messages.encode(message))

    def send_pages(self, name: int, pages: PageSet, closing: Message) -> None:
        """Send a set of pages under ``name``, and then the message that says it is complete."""
        bits = pages.bits()
        with self._sending:
            for at in range(0, bits.size, _PART):
                if (part := bits[at : at + _PART]).any():
                    self.channel.send_pageset(name, at * 8, part.data)
            self.channel.send_message(messages.encode(closing))

    def send_stream(self, data: memoryview) -> None:
        """Send raw bytes; an empty view ends the stream."""
        with self._sending:
            self.channel.send_stream(data)

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame.

        :raise UnreachableError: the stream ended, or ``timeout`` seconds passed.
        """
        return self.channel.receive(timeout)
