"""Who is let into a migration: the source, once for each stream; everybody else is turned away and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from outboard.errors import OutboardError, PeerError, RefusedError, UnreachableError
from outboard.migrate import admission as module
from outboard.migrate import messages
from outboard.migrate.admission import Admission
from outboard.wire.channel import Channel
from outboard.wire.pki import create_authority, issue_host
from outboard.wire.tls import Listener, connect
from outboard.wire.token import TokenBook

ADDRESS = "127.0.0.1"
PREPARE = messages.Prepare(migration="m1", vm="web", spec="", layout=[(0, 100, 0)], running=True)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pki")
    create_authority(root / "ca")
    for name in ("a", "b", "c"):
        issue_host(root / "ca", root / name, name, [ADDRESS])
    return root


@dataclass
class Door:
    admission: Admission
    port: int
    tokens: dict[str, str]
    identities: Path

    def call(self, role: str, *, host: str = "a", migration: str = "m1", token: str | None = None) -> Channel:
        channel = connect(ADDRESS, self.port, self.identities / host, "b", 5, 100)
        hello = messages.Hello(migration=migration, role=role, token=self.tokens[role] if token is None else token)
        channel.send_message(messages.encode(hello))
        return channel

    def admit(self) -> tuple[threading.Thread, dict[str, Channel]]:
        streams: dict[str, Channel] = {}
        thread = threading.Thread(target=lambda: streams.update(self.admission.streams()))
        thread.start()
        return thread, streams


@pytest.fixture
def door(identities: Path) -> Iterator[Door]:
    book = TokenBook(time.monotonic)
    listener = Listener(ADDRESS, (43000, 43050), identities / "b")
    with Admission(PREPARE, "a", listener, book) as admission:
        yield Door(admission, listener.port, {role: book.issue(role) for role in messages.roles(1)}, identities)


def refused(channel: Channel) -> None:
    with pytest.raises(OutboardError):
        channel.receive(10)
    channel.close()


def test_the_source_is_let_in_by_its_tokens(door: Door) -> None:
    thread, streams = door.admit()
    ours = [door.call(role) for role in messages.roles(1)]
    thread.join(20)
    assert set(streams) == set(messages.roles(1))
    for channel in [*ours, *streams.values()]:
        channel.close()


@pytest.mark.parametrize(
    "how",
    [
        {"host": "c"},
        {"migration": "m2"},
        {"token": "0" * 64},
        {"token": ""},
    ],
    ids=["another-host", "another-migration", "wrong-token", "no-token"],
)
def test_a_stranger_is_turned_away_and_the_source_still_let_in(door: Door, how: dict[str, str]) -> None:
    thread, streams = door.admit()
    refused(door.call("bulk", **how))
    ours = [door.call(role) for role in messages.roles(1)]
    thread.join(20)
    assert set(streams) == set(messages.roles(1))
    for channel in [*ours, *streams.values()]:
        channel.close()


def test_a_token_serves_once(door: Door) -> None:
    thread, streams = door.admit()
    ours = [door.call("bulk")]
    refused(door.call("bulk"))
    ours += [door.call(role) for role in messages.roles(1) if role != "bulk"]
    thread.join(20)
    assert set(streams) == set(messages.roles(1))
    for channel in [*ours, *streams.values()]:
        channel.close()


def test_a_token_is_for_one_stream(door: Door) -> None:
    thread, streams = door.admit()
    refused(door.call("control", token=door.tokens["bulk"]))
    ours = [door.call(role) for role in messages.roles(1)]
    thread.join(20)
    assert set(streams) == set(messages.roles(1))
    for channel in [*ours, *streams.values()]:
        channel.close()


def test_a_source_that_stays_away(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP_S", 0.3)
    with door.call("control") as one:
        with pytest.raises(UnreachableError):
            door.admission.streams()
        refused(one)


def test_a_refusal_reaches_the_source_with_its_exit_code(door: Door) -> None:
    error = RefusedError("no-room", "b has no room for web")
    thread = threading.Thread(target=lambda: door.admission.refuse(error))
    thread.start()
    ours = {role: door.call(role) for role in messages.roles(1)}
    with pytest.raises(OutboardError, match="b has no room for web") as caught:
        messages.expect(ours["control"].receive(10).payload, messages.Welcome)
    assert caught.value.exit_code == error.exit_code
    thread.join(20)
    for channel in ours.values():
        channel.close()


def test_a_vm_without_memory(identities: Path) -> None:
    empty = messages.Prepare(migration="m1", vm="web", spec="", layout=[], running=True)
    with (
        Listener(ADDRESS, (43000, 43050), identities / "b") as listener,
        pytest.raises(PeerError, match="without memory"),
    ):
        Admission(empty, "a", listener, TokenBook(time.monotonic))


@pytest.mark.parametrize("streams", [0, -1, messages.MAX_STREAMS + 1, 1 << 40])
def test_as_many_streams_as_the_peer_likes(identities: Path, streams: int) -> None:
    wanted = msgspec.structs.replace(PREPARE, streams=streams)
    with (
        Listener(ADDRESS, (43000, 43050), identities / "b") as listener,
        pytest.raises(PeerError, match=f"wants {streams} streams"),
    ):
        Admission(wanted, "a", listener, TokenBook(time.monotonic))


def test_several_streams_for_the_bulk_and_no_other(identities: Path) -> None:
    book = TokenBook(time.monotonic)
    listener = Listener(ADDRESS, (43000, 43050), identities / "b")
    with Admission(msgspec.structs.replace(PREPARE, streams=3), "a", listener, book) as admission:
        door = Door(admission, listener.port, admission.issue(), identities)
        assert tuple(door.tokens) == messages.roles(3)
        thread, streams = door.admit()
        refused(door.call("bulk-4", token=door.tokens["bulk-3"]))
        # A token that was shown is used up, and goes for its own role alone.
        door.tokens["bulk-3"] = book.issue("bulk-3")
        ours = [door.call(role) for role in reversed(messages.roles(3))]
        thread.join(20)
        assert set(streams) == set(messages.roles(3))
        assert messages.bulk_of(streams) == [streams[role] for role in ("bulk", "bulk-2", "bulk-3")]
        for channel in [*ours, *streams.values()]:
            channel.close()


def test_whoever_waits_for_the_source_looks_after_something_else(door: Door) -> None:
    def look() -> None:
        raise OutboardError("the VM has ended")

    with pytest.raises(OutboardError, match="the VM has ended"):
        door.admission.streams(look)
