"""Who may take part in a migration: the source's streams, each once, and nobody else's.

The port is open before the destination's QEMU is: the source's calls and QEMU's start take as long as each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from outboard.errors import NotAuthorisedError, OutboardError, PeerError, UnreachableError
from outboard.migrate import messages
from outboard.migrate.messages import Hello, Prepare
from outboard.wire.channel import Channel
from outboard.wire.tls import Listener
from outboard.wire.token import TokenBook

_STEP_S = 30.0
_LOOK_S = 0.5


class Admission:
    """The door of one incoming migration; a context manager that closes it.

    :param source: the name that the source's certificate must carry.
    :raise PeerError: ``prepare`` describes a VM without memory, or wants more streams than there may be.
    """

    def __init__(self, prepare: Prepare, source: str, listener: Listener, tokens: TokenBook) -> None:
        self._prepare = prepare
        self._source = source
        self._listener = listener
        self._tokens = tokens
        self._pages = max((first + pages for first, pages, _ in prepare.layout), default=0)
        if self._pages <= 0:
            raise PeerError(f"{source} announced {prepare.vm} without memory")
        if not 0 < prepare.streams <= messages.MAX_STREAMS:
            raise PeerError(
                f"{source} wants {prepare.streams} streams for {prepare.vm}; 1 to {messages.MAX_STREAMS} go"
            )
        self._roles = messages.roles(prepare.streams)

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.close()

    def issue(self) -> dict[str, str]:
        """A token for each of the streams."""
        return {role: self._tokens.issue(role) for role in self._roles}

    def streams(self, look: Callable[[], None] = lambda: None) -> dict[str, Channel]:
        """All of this migration's streams, by their roles.

        :param look: called every now and then while nobody comes; whatever it raises ends the waiting.
        :raise UnreachableError: they did not come.
        """
        streams: dict[str, Channel] = {}
        deadline = time.monotonic() + _STEP_S
        try:
            while len(streams) < len(self._roles):
                left = max(0.0, deadline - time.monotonic())
                try:
                    # Anybody may call this port: who is not of this migration is turned away, and the rest waited for.
                    channel = self._listener.accept(min(left, _LOOK_S), self._pages)
                except NotAuthorisedError:
                    continue
                except UnreachableError:
                    if left <= _LOOK_S:
                        waited = f"{_STEP_S:.0f} s"
                        raise UnreachableError(f"{self._source} did not open all streams within {waited}") from None
                    look()
                    continue
                try:
                    hello = messages.expect(channel.receive(_STEP_S).payload, Hello)
                    self._authorise(channel, hello)
                except OutboardError:
                    channel.close()
                    continue
                streams[hello.role] = channel
        except OutboardError:
            for channel in streams.values():
                channel.close()
            raise
        return streams

    def refuse(self, error: OutboardError) -> None:
        """Tell the source that nothing comes of it.

        :raise UnreachableError: it does not come to be told.
        """
        streams = self.streams()
        streams["control"].send_message(messages.encode(messages.Failed(why=str(error), exit_code=error.exit_code)))
        for channel in streams.values():
            channel.close()

    def _authorise(self, channel: Channel, hello: Hello) -> None:
        if channel.peer_name != self._source:
            raise NotAuthorisedError(f"{channel.peer_name} opened a stream of a migration from {self._source}")
        if hello.migration != self._prepare.migration or hello.role not in self._roles:
            raise NotAuthorisedError(f"{self._source} opened a stream of another migration")
        self._tokens.redeem(hello.token, hello.role)
