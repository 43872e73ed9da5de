"""The client against a real memcached, and against one that forgets or goes away."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from demo.client import VALUE_BYTES, value_of
from demo.hosts import Namespace, Testbed, TestbedError
from demo.load import Load

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(shutil.which("memcached") is None, reason="memcached is not installed"),
]

TARGETS = {"web": ("10.77.0.1", 11211)}


@pytest.fixture
def memcached() -> Iterator[tuple[Namespace, subprocess.Popen[bytes]]]:
    with Testbed() as bed:
        server = bed.client.popen(["memcached", "-u", "root", "-l", "10.77.0.1", "-t", "1"])
        deadline = time.monotonic() + 10
        while True:
            try:
                bed.client.call(lambda: socket.create_connection(TARGETS["web"], timeout=1)).close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        yield bed.client, server
        server.kill()
        server.wait()


def say(namespace: Namespace, line: bytes) -> bytes:
    with namespace.call(lambda: socket.create_connection(TARGETS["web"], timeout=5)) as connection:
        connection.sendall(line + b"\r\n")
        return connection.recv(4096)


def gets(namespace: Namespace) -> int:
    stats = say(namespace, b"stats").decode().split()
    return int(stats[stats.index("cmd_get") + 1])


def wait_for_gets(namespace: Namespace, more: int) -> None:
    enough = gets(namespace) + more
    deadline = time.monotonic() + 20
    while gets(namespace) < enough:
        assert time.monotonic() < deadline


def test_values_tell_key_and_version() -> None:
    assert len(value_of("web-1-1", 3)) == VALUE_BYTES
    assert len({value_of(key, version) for key in ("a", "b") for version in range(3)}) == 6


def test_answers_are_counted(memcached: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    namespace, _ = memcached
    with Load(namespace, TARGETS, connections=2) as load:
        began = time.monotonic()
        wait_for_gets(namespace, 20_000)
        traffic = load.finish()
    assert traffic.broken == []
    assert traffic.wrong == []
    assert traffic.connections == 2
    assert sum(traffic.ops["web"]) > 15_000
    assert abs(traffic.origin_s - began) < 2
    assert traffic.wait_ms("web", traffic.origin_s, traffic.origin_s + 60) > 0
    assert 0 < traffic.cpu_s <= traffic.elapsed_s * 1.1


def test_a_lost_value_is_wrong(memcached: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    namespace, _ = memcached
    with Load(namespace, TARGETS, connections=1) as load:
        wait_for_gets(namespace, 100)
        assert say(namespace, b"flush_all") == b"OK\r\n"
        while True:
            seen = gets(namespace)
            time.sleep(0.2)
            if gets(namespace) == seen:  # the client has stopped asking
                break
        traffic = load.finish()
    assert len(traffic.wrong) == 1
    assert "got b'END" in traffic.wrong[0]


def test_a_broken_connection_is_told(memcached: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    namespace, server = memcached
    with Load(namespace, TARGETS, connections=3) as load:
        wait_for_gets(namespace, 100)
        server.kill()
        server.wait()
        time.sleep(0.2)
        traffic = load.finish()
    assert len(traffic.broken) == 3
    assert traffic.broken[0].startswith("web: ")


def test_nobody_there(memcached: tuple[Namespace, subprocess.Popen[bytes]]) -> None:
    namespace, _ = memcached
    with pytest.raises(TestbedError, match="could not reach web"):
        Load(namespace, {"web": ("10.77.0.1", 1)})
