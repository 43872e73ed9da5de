"""A burst is timed by whoever takes it in, and one that does not end is not put up with."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from outboard.errors import OutboardError, PeerError
from outboard.migrate import messages, probe
from outboard.wire.channel import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    with Channel(left, "source") as ours, Channel(right, "destination") as theirs:
        yield ours, theirs


def send(channel: Channel, parts: list[int]) -> threading.Thread:
    def run() -> None:
        # Whoever takes it in may have had enough.
        with contextlib.suppress(OutboardError):
            for size in parts:
                channel.send_stream(memoryview(bytes(size)))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_all_but_the_first_part_is_counted(ends: tuple[Channel, Channel]) -> None:
    thread = send(ends[0], [1000, 2000, 3000, 0])
    carried = probe.take_burst(ends[1])
    thread.join()
    assert carried.octets == 5000
    assert carried.seconds > 0


def test_no_burst_at_all(ends: tuple[Channel, Channel]) -> None:
    send(ends[0], [0]).join()
    assert probe.take_burst(ends[1]) == messages.Carried(0, 0.0)


def test_what_is_no_burst_or_has_no_end_is_refused(ends: tuple[Channel, Channel]) -> None:
    ends[0].send_message(b"{}")
    with pytest.raises(PeerError, match="MESSAGE frame came in a probe's burst"):
        probe.take_burst(ends[1])
    thread = send(ends[0], [1 << 20] * 40)
    with pytest.raises(PeerError, match="does not end"):
        probe.take_burst(ends[1])
    ends[1].close()
    thread.join()
