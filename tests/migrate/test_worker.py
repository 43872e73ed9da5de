"""Workers do what they are told, say why they end, and never outlive their engine."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from outboard.errors import NotFoundError, UnreachableError
from outboard.linux import pidfd
from outboard.migrate.worker import Worker


def echo(link: socket.socket) -> None:
    while order := link.recv(100):
        if order == b"fail":
            raise NotFoundError("told to fail")
        link.send(order)


def test_orders_and_reports() -> None:
    worker = Worker("test-echo", echo)
    worker.tell(b"one")
    assert worker.hear(5) == b"one"
    assert worker.hear(0) is None
    worker.end()
    worker.end()
    assert not pidfd.alive(worker.pid)


def test_a_failure_is_told_in_its_own_words() -> None:
    worker = Worker("test-echo", echo)
    worker.tell(b"fail")
    with pytest.raises(NotFoundError, match="told to fail"):
        worker.hear(5)
    worker.join()


def test_a_killed_worker_is_noticed() -> None:
    worker = Worker("test-echo", echo)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UnreachableError, match="test-echo ended without a word"):
        worker.hear(5)
    worker.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        worker.link.send(b"x")


def test_it_dies_with_its_engine() -> None:
    reader, writer = os.pipe()
    engine = os.fork()
    if engine == 0:
        worker = Worker("test-echo", echo)
        os.write(writer, worker.pid.to_bytes(4, "little"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(engine, 0)
    orphan = int.from_bytes(os.read(reader, 4), "little")
    os.close(reader)
    os.close(writer)
    try:
        handle = pidfd.open(orphan)
    except OSError:
        return
    assert pidfd.wait(handle, 5), "the worker outlived its engine"
    pidfd.close(handle)
