"""Who is let in: mutual TLS 1.3 with the cluster's certificates, and channels over it."""

from __future__ import annotations

import datetime
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from outboard.errors import (
    KernelError,
    NotAuthorisedError,
    NotFoundError,
    OutboardError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from outboard.wire import tls
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


def test_more_silent_callers_than_are_greeted_at_once_hold_up_others_for_one_deadline(
    identities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_HANDSHAKE_S", 0.3)
    monkeypatch.setattr(tls, "_HANDSHAKES", 2)
    with Listener(ADDRESS, PORTS, identities / "b") as listener:
        silent = [socket.create_connection((ADDRESS, listener.port)) for _ in range(2)]
        with connect(ADDRESS, listener.port, identities / "a", "b", 20) as ours:
            for _ in silent:
                with pytest.raises(NotAuthorisedError, match="timed out"):
                    listener.accept(20)
            with listener.accept(20) as theirs:
                ours.send_message(b"x")
                assert bytes(theirs.receive(5).payload) == b"x"
        for caller in silent:
            caller.close()


def test_a_caller_that_drips_is_given_up_at_the_deadline(identities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_HANDSHAKE_S", 0.3)
    stop = threading.Event()
    with (
        Listener(ADDRESS, PORTS, identities / "b") as listener,
        socket.create_connection((ADDRESS, listener.port)) as slow,
    ):

        def drip() -> None:
            # The head of a TLS record, and never the end of what it announces.
            try:
                for byte in b"\x16\x03\x01\x20\x00" + bytes(8192):
                    slow.send(bytes([byte]))
                    if stop.wait(0.01):
                        return
            except OSError:
                return

        dripping = threading.Thread(target=drip)
        dripping.start()
        with pytest.raises(NotAuthorisedError):
            listener.accept(20)
        stop.set()
        dripping.join()


def test_closing_waits_for_no_silent_caller(identities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_HANDSHAKE_S", 250.0)
    monkeypatch.setattr(tls, "_HANDSHAKES", 2)
    listener = Listener(ADDRESS, PORTS, identities / "b")
    silent = [socket.create_connection((ADDRESS, listener.port)) for _ in range(4)]
    # Two are being greeted, and the accepting thread waits for one of them to end.
    while sum(thread.name == "handshake" for thread in threading.enumerate()) < 2:
        threading.Event().wait(0.001)
    began = time.monotonic()
    listener.close()
    assert time.monotonic() - began < 100
    for caller in silent:
        caller.close()


def test_calls_that_nobody_accepted_end_with_the_listener(identities: Path) -> None:
    listener = Listener(ADDRESS, PORTS, identities / "b")
    with connect(ADDRESS, listener.port, identities / "a", "b", 5) as ours:
        listener.close()
        with pytest.raises(UnreachableError, match="gone"):
            ours.receive(20)
    for _ in range(2):
        with pytest.raises(UnreachableError, match="was closed"):
            listener.accept(20)


def test_a_certificate_without_a_name_is_refused(listener: Listener, identities: Path, tmp_path: Path) -> None:
    signer = serialization.load_pem_private_key((identities / "ca" / "ca-key.pem").read_bytes(), None)
    root = x509.load_pem_x509_certificate((identities / "ca" / "ca.pem").read_bytes())
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    nameless = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(nameless.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "ca.pem").write_bytes(root.public_bytes(pem))
    with (
        connect(ADDRESS, listener.port, tmp_path, "b", 5) as ours,
        pytest.raises(NotAuthorisedError, match="names no host"),
    ):
        listener.accept(20)
    assert ours.peer_name == "b"


def test_no_free_descriptor_is_waited_out(listener: Listener) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as caller:
        free = os.dup(caller.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            caller.connect((ADDRESS, listener.port))
            busy = time.process_time()
            with pytest.raises(UnreachableError, match="nobody called"):
                listener.accept(0.5)
            # The caller makes poll(2) return at once all the while.
            assert time.process_time() - busy < 0.2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        caller.shutdown(socket.SHUT_WR)
        with pytest.raises(NotAuthorisedError):
            listener.accept(20)


@pytest.mark.parametrize("name", ["", ".b", "b" * 70])
def test_a_name_that_can_be_no_hosts(listener: Listener, identities: Path, name: str) -> None:
    with pytest.raises(UsageError, match="neither a host name"):
        connect(ADDRESS, listener.port, identities / "a", name, 5)
    with pytest.raises(UsageError, match="neither a host name"):
        connect(name, listener.port, identities / "a", "b", 5)


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


def test_a_certificate_that_was_issued_anew_counts_from_the_next_connection(identities: Path, tmp_path: Path) -> None:
    issue_host(identities / "other-ca", tmp_path / "b", "b", [ADDRESS])
    with Listener(ADDRESS, PORTS, tmp_path / "b") as before, pytest.raises(OutboardError):
        connect(ADDRESS, before.port, identities / "a", "b", 5)
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    issue_host(identities / "ca", tmp_path / "b", "b", [ADDRESS])
    with (
        Listener(ADDRESS, PORTS, tmp_path / "b") as after,
        connect(ADDRESS, after.port, identities / "a", "b", 5) as ours,
        after.accept(5) as theirs,
    ):
        assert (ours.peer_name, theirs.peer_name) == ("b", "a")
