"""The guest agent: one contract for the real one and for the fake, then everything that a hostile one can try."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outboard.errors import OutboardError, PeerError, UnreachableError
from outboard.linux import proc
from outboard.vmm.guest_agent import GuestAgent, GuestAgentError
from tests.support.fake_agent import FakeAgent, Twist
from tests.support.machine import ROOT, Machine
from tests.support.requirements import require

INIT = (ROOT / "guest" / "init").read_bytes()
"""A file that the test guest has, and so does the fake."""


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.slow)])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if request.param == "real":
        require("qemu")
        with Machine(256, boot=True) as vm:
            yield vm.agent
    else:
        path = tmp_path_factory.mktemp("agent") / "agent.sock"
        with FakeAgent(path, {"/init": INIT}):
            yield path


class TestContract:
    def test_runs_programs(self, port: Path) -> None:
        with GuestAgent(port, 10) as agent:
            assert agent.run("/bin/echo", "one", "two words") == (0, b"one two words\n")
            assert agent.run("/bin/sh", "-c", "exit 3") == (3, b"")

    @pytest.mark.parametrize("chunk", [100, len(INIT), 1 << 16])
    def test_reads_files(self, port: Path, chunk: int) -> None:
        with GuestAgent(port, 10) as agent:
            parts = list(agent.read_file("/init", chunk))
            assert b"".join(parts) == INIT
            assert max(map(len, parts)) <= chunk

    def test_reads_from_somewhere_in_a_file(self, port: Path) -> None:
        with GuestAgent(port, 10) as agent:
            assert b"".join(agent.read_file("/init", 100, skip=333)) == INIT[333:]

    def test_a_reader_may_have_enough(self, port: Path) -> None:
        with GuestAgent(port, 10) as agent:
            for part in agent.read_file("/init", 64):
                assert part == INIT[:64]
                break
            assert agent.run("/bin/echo", "still here") == (0, b"still here\n")

    def test_refusals_do_not_end_the_conversation(self, port: Path) -> None:
        with GuestAgent(port, 10) as agent:
            for attempt in (
                lambda: agent.run("/no/such/program"),
                lambda: list(agent.read_file("/no/such/file", 100)),
                lambda: agent.execute("guest-no-such-command", int),
                lambda: agent.execute("guest-exec-status", dict, pid=123456),
            ):
                with pytest.raises(GuestAgentError, match="the guest agent says"):
                    attempt()
            assert agent.run("/bin/echo", "still here") == (0, b"still here\n")

    def test_one_conversation_after_another(self, port: Path) -> None:
        for number in range(3):
            with GuestAgent(port, 10) as agent:
                assert agent.run("/bin/echo", str(number)) == (0, f"{number}\n".encode())

    def test_an_answer_of_another_type(self, port: Path) -> None:
        with GuestAgent(port, 10) as agent, pytest.raises(PeerError, match="Expected `str`"):
            agent.execute("guest-file-open", str, path="/init", mode="r")


def answering(command: str, answer: bytes | None) -> Twist:
    return lambda asked, proper: answer if asked == command else proper


def returning(command: str, value: object) -> Twist:
    return answering(command, json.dumps({"return": value}).encode() + b"\n")


def seconds(error: type[OutboardError]) -> float:
    """Short where the timeout is what is tested, long where a loaded machine must not turn another error into it."""
    return 0.5 if error is UnreachableError else 9


BOMB = b"[" * 100_000
PART = base64.b64encode(b"x" * 100).decode()


@pytest.mark.parametrize(
    ("twist", "error", "words"),
    [
        (answering("guest-exec", b"not json\n"), PeerError, "what is none"),
        (answering("guest-exec", b"\xc3\x28\n"), PeerError, "what is none"),
        (answering("guest-exec", b"[]\n"), PeerError, "what is none"),
        (answering("guest-exec", b"{}\n"), PeerError, "without a result"),
        (answering("guest-exec", b'{"return": ' + BOMB + b"}\n"), PeerError, "what is none"),
        (answering("guest-exec", b'{"return": {"pid": 1, "x": ' + BOMB + b"\n"), PeerError, "what is none"),
        (returning("guest-exec", {"pid": "one"}), PeerError, "Expected `int`"),
        (returning("guest-exec", None), PeerError, "Expected `object`"),
        (returning("guest-exec-status", {"exited": True, "exitcode": "0"}), PeerError, "Expected `int`"),
        (returning("guest-exec-status", {"exited": True, "out-data": 7}), PeerError, "Expected `str`"),
        (returning("guest-exec-status", {"exited": True, "out-data": "!!"}), PeerError, "no base64"),
        (returning("guest-exec-status", {"exited": True, "out-data": "\u00e9"}), PeerError, "no base64"),
        (returning("guest-exec-status", {"exited": True, "out-truncated": True}), PeerError, "more .* than its agent"),
        (returning("guest-exec-status", {"exited": False}), UnreachableError, "in time"),
        (answering("guest-exec", None), UnreachableError, "in time"),
        (answering("guest-exec", b"x" * 65536 + b"..."), PeerError, "more than 4 MiB for one answer"),
        (answering("guest-exec", b'{"return": "' + b"x" * (5 << 20) + b'"}\n'), PeerError, "more than 4 MiB"),
    ],
)
def test_a_hostile_program(tmp_path: Path, twist: Twist, error: type[OutboardError], words: str) -> None:
    with FakeAgent(tmp_path / "a", {}, twist=twist), GuestAgent(tmp_path / "a", seconds(error)) as agent:
        began = time.monotonic()
        with pytest.raises(error, match=words):
            agent.run("/bin/echo", "x")
        assert time.monotonic() - began < 10
        with pytest.raises(UnreachableError, match="is over"):
            agent.run("/bin/echo", "x")


@pytest.mark.parametrize(
    ("twist", "error", "words"),
    [
        (returning("guest-file-open", {"handle": 1}), PeerError, "Expected `int`"),
        (returning("guest-file-read", {"eof": False, "buf-b64": PART}), PeerError, "100 bytes where 64 were asked"),
        (returning("guest-file-read", {"buf-b64": PART}), PeerError, "missing required field"),
        (returning("guest-file-read", {"eof": 1, "buf-b64": ""}), PeerError, "Expected `bool`"),
        (answering("guest-file-read", None), UnreachableError, "in time"),
    ],
)
def test_a_hostile_file(tmp_path: Path, twist: Twist, error: type[OutboardError], words: str) -> None:
    with (
        FakeAgent(tmp_path / "a", {"/f": bytes(1000)}, twist=twist) as fake,
        GuestAgent(tmp_path / "a", seconds(error)) as agent,
    ):
        began = time.monotonic()
        with pytest.raises(error, match=words):
            list(agent.read_file("/f", 64))
        assert time.monotonic() - began < 10
        # The conversation is over: it is not asked to close what it has.
        assert "guest-file-close" not in fake.commands


def test_a_file_without_end_ends_with_the_deadline(tmp_path: Path) -> None:
    twist = returning("guest-file-read", {"eof": False, "buf-b64": PART})
    with FakeAgent(tmp_path / "a", {"/f": b""}, twist=twist), GuestAgent(tmp_path / "a", 5) as agent:
        began = time.monotonic()
        with pytest.raises(UnreachableError):
            for _ in agent.read_file("/f", 100, deadline=began + 0.3):
                pass
        assert time.monotonic() - began < 10


def test_a_refusal_is_shown_short_and_harmless(tmp_path: Path) -> None:
    words = "\x1b[2Jgone\r\n" + "x" * 100_000
    twist = answering("guest-exec", json.dumps({"error": {"class": "E", "desc": words}}).encode() + b"\n")
    with FakeAgent(tmp_path / "a", {}, twist=twist), GuestAgent(tmp_path / "a", 5) as agent:
        with pytest.raises(GuestAgentError) as caught:
            agent.run("/bin/echo")
        assert "?[2Jgone??xxx" in str(caught.value)
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


def test_what_an_earlier_client_left_is_thrown_away(tmp_path: Path) -> None:
    stale = b'"half an answer}\n\xff{"return": 17}\n{"return": {"pid": 5}}\n\xff{"error": {"desc": "syntax"}}\n'
    with FakeAgent(tmp_path / "a", {}, stale=stale), GuestAgent(tmp_path / "a", 5) as agent:
        assert agent.run("/bin/echo", "clean") == (0, b"clean\n")


@pytest.mark.parametrize(
    ("twist", "error"),
    [
        (lambda _command, _answer: None, UnreachableError),
        (lambda _command, _answer: b'\xff{"return": 1}\n...', UnreachableError),
        (lambda _command, _answer: b"\xff{}\n", PeerError),
        (lambda _command, _answer: b"\xffgarbage\n", PeerError),
        (lambda _command, _answer: b"x" * 65536 + b"...", PeerError),
    ],
)
def test_an_agent_that_does_not_synchronise(tmp_path: Path, twist: Twist, error: type[OutboardError]) -> None:
    before = len(proc.descriptors(os.getpid()))
    with FakeAgent(tmp_path / "a", {}, twist=twist):
        began = time.monotonic()
        with pytest.raises(error):
            GuestAgent(tmp_path / "a", seconds(error))
        assert time.monotonic() - began < 10
    assert len(proc.descriptors(os.getpid())) == before


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="No such file"):
        GuestAgent(tmp_path / "none", 1)
    (tmp_path / "file").touch()
    with pytest.raises(UnreachableError, match="not a socket"):
        GuestAgent(tmp_path / "file", 1)


def test_the_port_of_a_guest_that_has_no_agent(tmp_path: Path) -> None:
    require("qemu")
    path = tmp_path / "agent.sock"
    port = ("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0")
    with (
        Machine(16, "-chardev", f"socket,id=agent,path={path},server=on,wait=off", *port),
        pytest.raises(UnreachableError, match="is qemu-ga running in the guest"),
    ):
        GuestAgent(path, 0.2)
