"""Clients of an engine's socket: taken in, heard, answered, and never left waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from outboard.agent.clients import Clients


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def clients(path: Path) -> Iterator[Clients]:
    made = Clients(path)
    yield made
    made.close()


def connect(path: Path) -> Connection:
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.fspath(path))
    return Connection(client.detach())


def test_who_speaks_is_heard_and_answered(clients: Clients, path: Path) -> None:
    one, other = connect(path), connect(path)
    one.send_bytes(b"hello")
    assert clients.speaking(0) == []
    (heard,) = clients.speaking(0)
    assert heard.recv_bytes() == b"hello"
    heard.send_bytes(b"yes")
    assert one.recv_bytes() == b"yes"
    one.close()
    clients.drop(heard)
    assert clients.speaking(0) == []
    other.close()
    (gone,) = clients.speaking(0)
    clients.drop(gone)
    assert clients.speaking(0) == []


def test_nobody_is_left_waiting(clients: Clients, path: Path) -> None:
    known = connect(path)
    clients.speaking(0)
    late = connect(path)
    late.send_bytes(b"order")
    clients.turn_away()
    with pytest.raises((EOFError, ConnectionResetError)):
        late.recv_bytes()
    late.close()
    assert not known.poll(0)
    clients.close()
    with pytest.raises(EOFError):
        known.recv_bytes()
    known.close()


def test_another_descriptor_is_waited_for_as_well(path: Path) -> None:
    reader, writer = os.pipe()
    clients = Clients(path, reader)
    clients.speaking(0)
    was_called = clients.called
    os.write(writer, b"x")
    assert clients.speaking(30) == []
    assert (was_called, clients.called) == (False, True)
    clients.close()
    os.close(reader)
    os.close(writer)


def test_a_socket_that_was_left_behind_is_replaced(path: Path) -> None:
    Clients(path).turn_away()
    again = Clients(path)
    connect(path).close()
    again.close()
