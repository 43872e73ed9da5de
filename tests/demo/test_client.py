"""The client against a server that speaks memcached's text protocol, and one that forgets or goes away."""

from __future__ import annotations

import contextlib
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from demo.client import VALUE_BYTES, value_of
from demo.hosts import Namespace, Testbed, TestbedError
from demo.load import Load
from tests.support.requirements import require

ADDRESS = ("10.77.0.1", 11211)


class Memcached(socketserver.ThreadingTCPServer):
    """As much of memcached as the client uses: get and set, in their text form."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(ADDRESS, Conversation)
        self.values: dict[bytes, bytes] = {}
        self.answers = 0
        self.ending = False

    def wait_for_answers(self, more: int) -> None:
        enough = self.answers + more
        deadline = time.monotonic() + 20
        while self.answers < enough:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        idle_since, seen = time.monotonic(), self.answers
        while time.monotonic() - idle_since < 0.2:
            if self.answers != seen:
                idle_since, seen = time.monotonic(), self.answers
            time.sleep(0.01)


class Conversation(socketserver.StreamRequestHandler):
    server: Memcached

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client ends without a goodbye
            self._converse()

    def _converse(self) -> None:
        while (line := self.rfile.readline()) and not self.server.ending:
            words = line.split()
            if words[0] == b"set":
                self.server.values[words[1]] = self.rfile.read(int(words[4]) + 2)[:-2]
                self.wfile.write(b"STORED\r\n")
            else:
                value = self.server.values.get(words[1])
                found = b"" if value is None else b"VALUE %s 0 %d\r\n%s\r\n" % (words[1], len(value), value)
                self.wfile.write(found + b"END\r\n")
            self.server.answers += 1


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    require("root")
    with Testbed() as bed:
        yield bed.client


@pytest.fixture
def server(namespace: Namespace) -> Iterator[Memcached]:
    with namespace.call(Memcached) as memcached:
        thread = threading.Thread(target=memcached.serve_forever, args=(0.01,))
        thread.start()
        yield memcached
        memcached.shutdown()
        thread.join()


def test_values_tell_key_and_version() -> None:
    assert len(value_of("web-1-1", 3)) == VALUE_BYTES
    assert len({value_of(key, version) for key in ("a", "b") for version in range(3)}) == 6


def test_answers_are_counted(namespace: Namespace, server: Memcached) -> None:
    with Load(namespace, {"web": ADDRESS}, connections=2) as load:
        began = time.monotonic()
        server.wait_for_answers(10_000)
        traffic = load.finish()
    assert traffic.broken == []
    assert traffic.wrong == []
    assert traffic.connections == 2
    assert 2_000 < sum(traffic.ops["web"]) <= server.answers
    assert abs(traffic.origin_s - began) < 2
    assert traffic.wait_ms("web", traffic.origin_s, traffic.origin_s + 60) > 0
    assert 0 < traffic.cpu_s <= traffic.elapsed_s * 1.1


@pytest.mark.parametrize("wrong", [None, b"another value"])
def test_a_lost_or_another_value_is_wrong(namespace: Namespace, server: Memcached, wrong: bytes | None) -> None:
    with Load(namespace, {"web": ADDRESS}, connections=1) as load:
        server.wait_for_answers(100)
        # The next get is answered by nothing, or by something else, whatever it is for.
        server.values = {} if wrong is None else dict.fromkeys(server.values, wrong)
        server.wait_until_idle()
        traffic = load.finish()
    assert len(traffic.wrong) == 1
    assert traffic.broken == []


def test_a_broken_connection_is_told(namespace: Namespace, server: Memcached) -> None:
    with Load(namespace, {"web": ADDRESS}, connections=3) as load:
        server.wait_for_answers(100)
        server.ending = True
        server.wait_until_idle()
        traffic = load.finish()
    assert len(traffic.broken) == 3
    assert traffic.broken[0].startswith("web: ")


def test_nobody_there(namespace: Namespace) -> None:
    with pytest.raises(TestbedError, match="could not reach web"):
        Load(namespace, {"web": ("10.77.0.1", 1)})
