"""Who is let in: mutual TLS 1.3 with the cluster's certificates, and channels over it."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outboard.errors import (
    KernelError,
    NotAuthorisedError,
    NotFoundError,
    OutboardError,
    RefusedError,
    UnreachableError,
)
from outboard.wire.channel import Channel
from outboard.wire.frames import Kind
from outboard.wire.pki import create_authority, issue_host
from outboard.wire.tls import Listener, connect

ADDRESS = "127.0.0.1"
PORTS = (42000, 42050)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pki")
    create_authority(root / "ca")
    create_authority(root / "other-ca")
    issue_host(root / "ca", root / "a", "a", [ADDRESS])
    issue_host(root / "ca", root / "b", "b", [ADDRESS])
    issue_host(root / "ca", root / "late", "late", [ADDRESS], days=-1)
    issue_host(root / "other-ca", root / "stranger", "a", [ADDRESS])
    return root


@pytest.fixture
def listener(identities: Path) -> Iterator[Listener]:
    with Listener(ADDRESS, PORTS, identities / "b") as made:
        yield made


@pytest.fixture
def pair(listener: Listener, identities: Path) -> Iterator[tuple[Channel, Channel]]:
    with connect(ADDRESS, listener.port, identities / "a", "b", 5, 1000) as ours, listener.accept(5, 1000) as theirs:
        yield ours, theirs


def test_both_ends_know_each_other_and_speak_tls_1_3(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    assert theirs.peer_name == "a"
    assert ours.peer_name == "b"
    assert isinstance(ours.socket, ssl.SSLSocket)
    assert ours.socket.version() == "TLSv1.3"


def test_every_kind_of_frame_arrives(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send_message(b"hello")
    assert bytes(theirs.receive(5).payload) == b"hello"
    content = np.random.default_rng(1).integers(0, 256, 3 * 4096, dtype=np.uint8)
    zero = np.array([False, True, False, False])
    sent = ours.send_pages([(10, 2), (500, 2)], zero, content.data)
    assert sent > 3 * 4096
    pages = theirs.pages(theirs.receive(5))
    assert pages.runs == [(10, 2), (500, 2)]
    assert bytes(pages.data) == content.tobytes()
    ours.send_request([1, 2, 999])
    assert theirs.requested(theirs.receive(5)) == (1, 2, 999)
    ours.send_pageset(7, 16, memoryview(b"\x05"))
    part = theirs.pageset(theirs.receive(5))
    assert (part.name, part.first, part.bits.tolist()) == (7, 16, [5])
    ours.send_stream(memoryview(b""))
    assert theirs.receive(5).kind is Kind.STREAM


def test_frames_that_came_together_are_pending(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    for number in range(3):
        ours.send_message(b"%d" % number)
    assert bytes(theirs.receive(5).payload) == b"0"
    for expected in (b"1", b"2"):
        assert bytes(theirs.receive(5).payload) == expected
    assert not theirs.pending()


def test_a_timeout_is_told(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(UnreachableError, match="in time"):
        pair[1].receive(0.05)


def test_a_closed_or_torn_connection_is_told_at_once(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.close()
    with pytest.raises(UnreachableError, match="gone"):
        theirs.receive(5)


def test_one_thread_sends_while_another_receives(pair: tuple[Channel, Channel]) -> None:
    block = memoryview(os.urandom(200_000))
    count = 100

    def send(channel: Channel) -> None:
        for _ in range(count):
            channel.send_stream(block)

    senders = [threading.Thread(target=send, args=(channel,)) for channel in pair]
    for sender in senders:
        sender.start()
    received: list[int] = []

    def receive(channel: Channel) -> None:
        received.append(sum(bytes(channel.receive(20).payload) == bytes(block) for _ in range(count)))

    receivers = [threading.Thread(target=receive, args=(channel,)) for channel in pair]
    for receiver in receivers:
        receiver.start()
    for thread in (*senders, *receivers):
        thread.join()
    assert received == [count, count]


def test_a_forked_process_goes_on_with_a_channel(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send_message(b"before")
    child = os.fork()
    if child == 0:
        ours.send_message(b"after")
        os._exit(0)
    os.waitpid(child, 0)
    assert [bytes(theirs.receive(5).payload) for _ in range(2)] == [b"before", b"after"]


@pytest.mark.parametrize("who", ["stranger", "late"])
def test_a_certificate_of_another_cluster_or_time_is_refused(listener: Listener, identities: Path, who: str) -> None:
    # TLS 1.3 tells the client only when it reads.
    with pytest.raises(NotAuthorisedError), connect(ADDRESS, listener.port, identities / who, "b", 5) as refused:
        refused.receive(5)
    with pytest.raises(NotAuthorisedError, match="certificate"):
        listener.accept(5)


def test_another_hosts_certificate_is_not_taken_for_the_one_meant(listener: Listener, identities: Path) -> None:
    with pytest.raises(NotAuthorisedError, match="did not show c's certificate"):
        connect(ADDRESS, listener.port, identities / "a", "c", 5)


def older(identity: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(identity / "ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    return context


def test_tls_1_2_is_not_spoken(listener: Listener, identities: Path) -> None:
    with socket.create_connection((ADDRESS, listener.port)) as raw, pytest.raises(ssl.SSLError):
        older(identities / "a").wrap_socket(raw, server_hostname="b")
    with pytest.raises(NotAuthorisedError):
        listener.accept(5)


def test_plain_text_and_silence_hold_up_nobody(listener: Listener, identities: Path) -> None:
    with socket.create_connection((ADDRESS, listener.port)), socket.create_connection((ADDRESS, listener.port)) as rude:
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
        began = time.monotonic()
        with connect(ADDRESS, listener.port, identities / "a", "b", 5) as ours:
            while True:
                try:
                    accepted = listener.accept(5)
                    break
                except NotAuthorisedError:
                    continue
            assert time.monotonic() - began < 4
            ours.send_message(b"x")
            assert bytes(accepted.receive(5).payload) == b"x"
            accepted.close()


def test_nobody_there(identities: Path) -> None:
    with pytest.raises(UnreachableError, match="no answer from b"):
        connect(ADDRESS, 1, identities / "a", "b", 1)


def test_nobody_calls(listener: Listener) -> None:
    with pytest.raises(UnreachableError, match="nobody called"):
        listener.accept(0.05)


def test_no_port_is_free(listener: Listener, identities: Path) -> None:
    with pytest.raises(KernelError, match="listen on"):
        Listener(ADDRESS, (listener.port, listener.port), identities / "a")


def test_a_closed_listener_leaves_no_thread(identities: Path) -> None:
    before = threading.active_count()
    made = Listener(ADDRESS, PORTS, identities / "b")
    made.close()
    made.close()
    assert threading.active_count() == before


def test_no_identity(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="outboard pki init"):
        connect(ADDRESS, 1, tmp_path, "b", 1)


def test_keys_are_private_and_never_overwritten(identities: Path) -> None:
    assert (identities / "a" / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(RefusedError, match="not overwritten"):
        issue_host(identities / "ca", identities / "a", "a", [])
    with pytest.raises(RefusedError, match="not overwritten"):
        create_authority(identities / "ca")


def test_a_name_that_is_none(identities: Path, tmp_path: Path) -> None:
    with pytest.raises(OutboardError, match="no host name"):
        issue_host(identities / "ca", tmp_path / "x", "../x", [])
