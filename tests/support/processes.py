"""The processes of a cluster's hosts, found from outside, and their connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from outboard.errors import KernelError
from outboard.linux import pidfd, proc
from tests.support.cluster import Host

_SYN_SENT = 2


def kill(pid: int) -> None:
    """SIGKILL; one that has ended already is left alone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes(host: Host) -> Iterator[tuple[int, str]]:
    """The processes of a host, each with the name that it gave itself."""
    mark = f"OUTBOARD_RUNTIME_DIR={host.runtime}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes() + b"\0":
                yield int(entry.name), (entry / "comm").read_text().strip()


def engines(host: Host) -> list[int]:
    """The engines at work on a host, also those whose agent is gone."""
    found = {pid for pid, name in processes(host) if name == "outboard-engine"}
    kept = []
    for pid in found:
        with contextlib.suppress(KernelError):
            # A worker has its engine's name until it takes its own.
            if proc.parent(pid) not in found:
                kept.append(pid)
    return kept


def _connections(engine: int) -> list[socket.socket]:
    """The TCP sockets of a process; close them."""
    found = []
    with contextlib.suppress(KernelError):
        process = pidfd.open(engine)
        try:
            for number, link in proc.descriptors(engine).items():
                if link.startswith("socket:"):
                    with contextlib.suppress(KernelError, OSError):
                        one = socket.socket(fileno=pidfd.getfd(process, number))
                        if one.family == socket.AF_INET and one.type == socket.SOCK_STREAM:
                            found.append(one)
                        else:
                            one.close()
        finally:
            pidfd.close(process)
    return found


def _count(engine: int, kind: Callable[[socket.socket], bool]) -> int:
    with contextlib.ExitStack() as open_:
        return sum(kind(open_.enter_context(one)) for one in _connections(engine))


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def connected(engine: int) -> int:
    """How many TCP connections a process has."""
    return _count(engine, _is_connected)


def calling(engine: int) -> int:
    """How many TCP connections a process waits for."""
    return _count(engine, lambda one: one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _SYN_SENT)
