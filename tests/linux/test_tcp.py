"""What the kernel knows of a connection."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from outboard.linux.tcp import SO_MAX_PACING_RATE, set_pacing_rate, tcp_info


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


def test_bytes_are_counted_until_they_are_acknowledged(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = pair
    sender.sendall(bytes(100_000))
    left = 100_000
    while left:
        left -= len(receiver.recv(left))
    sender.sendall(b"x")
    receiver.recv(1)
    info = tcp_info(sender)
    assert info.acknowledged_bytes >= 100_000
    assert 0 < info.min_rtt_us < 1_000_000
    assert 0 < info.rtt_us < 1_000_000
    assert info.delivery_rate > 0
    assert info.retransmits == 0


def test_a_rate_that_the_sender_held_down_is_marked(pair: tuple[socket.socket, socket.socket]) -> None:
    for _ in range(5):
        for sender, receiver in (pair, pair[::-1]):
            sender.sendall(b"x")
            receiver.recv(1)
    info = tcp_info(pair[0])
    assert info.app_limited
    assert info.delivery_rate > 0


def test_what_has_not_been_sent_is_told(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, _ = pair
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(1 << 16))
    assert tcp_info(sender).unsent_bytes > 0


def test_how_long_nothing_has_come(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = pair
    sender.sendall(b"x")
    receiver.recv(1)
    time.sleep(0.05)
    silent = tcp_info(receiver).silent_s
    assert silent >= 0.04
    sender.sendall(b"x")
    receiver.recv(1)
    assert tcp_info(receiver).silent_s < silent


@pytest.mark.parametrize(("rate", "kept"), [(125e6, 125_000_000), (0, 1), (10e9, 10_000_000_000), (None, 2**64 - 1)])
def test_a_pacing_rate_is_kept(pair: tuple[socket.socket, socket.socket], rate: float | None, kept: int) -> None:
    set_pacing_rate(pair[0], rate)
    raw = pair[0].getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
    assert int.from_bytes(raw, "little") == kept
