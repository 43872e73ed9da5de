"""Channels whose peer is slow, silent or gone in the middle of something: told, never waited for without end."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import UnreachableError
from outboard.wire import channel as channel_module
from outboard.wire import frames
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind
from outboard.wire.pki import create_authority, issue_host
from outboard.wire.tls import Listener, connect

ADDRESS = "127.0.0.1"
ENDLESS_S = 20.0


class Relay:
    """Carries one TCP connection to ``port``; :meth:`cut` lets so many more bytes through and then goes silent."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server((ADDRESS, 0))
        self.port = int(self._server.getsockname()[1])
        self._to = port
        self._left: int | None = None
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._carry)]
        self._threads[0].start()

    def cut(self, after: int) -> None:
        self._left = after

    def _carry(self) -> None:
        caller, _ = self._server.accept()
        called = socket.create_connection((ADDRESS, self._to))
        self._ends = [caller, called]
        back = threading.Thread(target=self._pump, args=(called, caller, False))
        self._threads.append(back)
        back.start()
        self._pump(caller, called, True)

    def _pump(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        try:
            while data := source.recv(65536):
                if limited and self._left is not None:
                    data, self._left = data[: self._left], max(0, self._left - len(data))
                sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._server.close()
        for end in self._ends:
            end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pki")
    create_authority(root / "ca")
    issue_host(root / "ca", root / "a", "a", [ADDRESS])
    issue_host(root / "ca", root / "b", "b", [ADDRESS])
    return root


@pytest.fixture
def relayed(identities: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Channel, Channel, Relay]]:
    """Both ends of a TLS channel over a relay; a peer that stops in a record is given up after half a second."""
    monkeypatch.setattr(channel_module, "_STALLED_S", 0.5)
    with Listener(ADDRESS, (42100, 42150), identities / "b") as listener:
        relay = Relay(listener.port)
        with connect(ADDRESS, relay.port, identities / "a", "b", 5) as ours, listener.accept(5) as theirs:
            yield ours, theirs, relay
            relay.close()


def outcome(channel: Channel, timeout: float | None) -> list[str]:
    """What ``receive`` says, from a thread, so that one that never returns fails the test instead of hanging it."""
    said: list[str] = []

    def receive() -> None:
        try:
            said.append(channel.receive(timeout).kind.name)
        except UnreachableError as error:
            said.append(str(error))

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    thread.join(ENDLESS_S)
    return said


@pytest.mark.parametrize("timeout", [0.1, None])
def test_a_peer_that_stops_inside_a_record_is_given_up(
    relayed: tuple[Channel, Channel, Relay], timeout: float | None
) -> None:
    ours, theirs, relay = relayed
    relay.cut(after=100)
    ours.send_message(bytes(5000))
    (said,) = outcome(theirs, timeout)
    assert "the connection to a is gone" in said


def test_a_peer_that_stops_between_records_is_given_up_at_the_deadline(relayed: tuple[Channel, Channel, Relay]) -> None:
    ours, theirs, _ = relayed
    ours._send(frames.header(Kind.MESSAGE, 5000) + b"the rest never comes")
    (said,) = outcome(theirs, 0.1)
    assert said == "a sent nothing in time"


def test_a_peer_that_drips_does_not_move_the_deadline(relayed: tuple[Channel, Channel, Relay]) -> None:
    ours, theirs, _ = relayed
    for byte in frames.header(Kind.MESSAGE, 1000) + bytes(100):
        ours._send(bytes([byte]))
    assert select.select([theirs], [], [], 5)[0]
    (said,) = outcome(theirs, 0)
    assert said == "a did not send all of a frame in time"


def test_a_frame_that_came_in_pieces_is_whole(relayed: tuple[Channel, Channel, Relay]) -> None:
    ours, theirs, _ = relayed
    whole = frames.header(Kind.MESSAGE, 20) + bytes(range(20))
    for at in range(0, len(whole), 7):
        ours._send(whole[at : at + 7])
    assert bytes(theirs.receive(5).payload) == bytes(range(20))


def test_a_channel_of_one_thread_waits_for_the_rest_of_a_frame(relayed: tuple[Channel, Channel, Relay]) -> None:
    """And past the time at which a channel that others use too would be given up."""
    ours, theirs, _ = relayed
    ours.take_over()
    theirs.take_over()
    whole = frames.header(Kind.MESSAGE, 50_000) + bytes(range(250)) * 200
    ours._send(whole[:10])
    later = [threading.Timer(0.8, ours._send, [whole[10:100]]), threading.Timer(1.0, ours._send, [whole[100:]])]
    for timer in later:
        timer.start()
    assert bytes(theirs.receive().payload) == whole[frames.HEADER_SIZE :]
    for timer in later:
        timer.join()
    for number in range(3):
        ours.send_message(b"%d" % number)
    assert [bytes(theirs.receive().payload) for _ in range(3)] == [b"0", b"1", b"2"]


def test_a_channel_of_one_thread_is_told_of_the_end() -> None:
    left, right = socket.socketpair()
    with Channel(left, "left") as ours, Channel(right, "right") as theirs:
        theirs.take_over()
        ours._send(frames.header(Kind.MESSAGE, 5000) + b"the rest never comes")
        ours.close()
        (said,) = outcome(theirs, None)
    assert "the connection to right is gone" in said


def test_a_deadline_still_counts_on_a_channel_of_one_thread(relayed: tuple[Channel, Channel, Relay]) -> None:
    _, theirs, _ = relayed
    theirs.take_over()
    assert outcome(theirs, 0.1) == ["a sent nothing in time"]


def test_plain_sockets_carry_frames_too() -> None:
    left, right = socket.socketpair()
    with Channel(left, "left") as ours, Channel(right, "right") as theirs:
        ours.send_message(b"hello")
        assert bytes(theirs.receive(5).payload) == b"hello"
        assert ours.bytes_sent == frames.HEADER_SIZE + 5
    with pytest.raises(UnreachableError, match="gone"):
        theirs.receive(1)
