"""The stock guest agent (qemu-ga), over its virtio-serial socket.

A guest is not trusted: every answer has a deadline and a size, and one that does not parse ends the conversation. The
protocol is QMP's, one JSON object a line, without a greeting; ``guest-sync-delimited`` first throws away what an
earlier client may have left in the pipe. Source: QEMU's qga/qapi-schema.json.
"""

from __future__ import annotations

import binascii
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from outboard.errors import OutboardError, PeerError, UnreachableError

_MOST = 4 << 20
"""Bytes of one answer: a megabyte of a file in base64, and room."""
_POLL_S = 0.005


class GuestAgentError(OutboardError):
    """The agent refused a command, in its own words."""


class GuestAgent:
    """A conversation with the guest agent behind the unix socket ``path``.

    :param timeout: seconds that any one answer may take.
    :raise UnreachableError: no agent answers there.
    :raise PeerError: what answers is no guest agent.

    Synchronization: one thread.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(os.fspath(path))
            self._synchronise()
        except OSError as error:
            self.close()
            raise UnreachableError(f"no guest agent answers at {path}: {error}") from error
        except OutboardError:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def __enter__(self) -> GuestAgent:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _synchronise(self) -> None:
        number = secrets.randbelow(1 << 31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._socket.sendall(b"\xff" + msgspec.json.encode(request) + b"\n")
        self._until(b"\xff", time.monotonic() + self._timeout)
        if self._answer("guest-sync-delimited") != number:
            raise PeerError(f"the guest agent at {self._path} answered another's synchronisation")

    def _until(self, mark: bytes, deadline: float) -> bytes:
        """What comes before ``mark``; what follows it is kept."""
        parts = [self._rest]
        size = len(self._rest)
        while mark not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise UnreachableError(f"the guest agent at {self._path} did not answer within {self._timeout:g} s")
            self._socket.settimeout(left)
            try:
                part = self._socket.recv(1 << 18)
            except TimeoutError:
                continue
            if not part:
                raise UnreachableError(f"the guest agent at {self._path} hung up")
            parts.append(part)
            size += len(part)
            if size > _MOST:
                raise PeerError(f"the guest agent at {self._path} sent more than {_MOST >> 20} MiB for one answer")
        before, _, self._rest = b"".join(parts).partition(mark)
        return before

    def _answer(self, command: str) -> Any:
        line = self._until(b"\n", time.monotonic() + self._timeout)
        try:
            answer: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise PeerError(f"{command}: the guest agent at {self._path} answered what is no JSON object") from error
        if "error" in answer:
            raise GuestAgentError(f"{command}: the guest agent says: {answer['error']}")
        if "return" not in answer:
            raise PeerError(f"{command}: the guest agent at {self._path} answered without a result")
        return answer["return"]

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute one of the agent's commands.

        :raise GuestAgentError: it refused; :raise PeerError: its answer is none; :raise UnreachableError: no answer.
        """
        request = {"execute": command, "arguments": arguments}
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
        except OSError as error:
            raise UnreachableError(f"{command}: the guest agent at {self._path} hung up: {error}") from error
        return self._answer(command)

    def run(self, path: str, *arguments: str) -> tuple[int, bytes]:
        """Run a program inside the guest and wait for its end: exit status and standard output.

        :raise GuestAgentError: there is no such program, or exec is disabled; others as :meth:`execute`.
        """
        started = _typed(self.execute("guest-exec", path=path, arg=list(arguments), **{"capture-output": True}), dict)
        deadline = time.monotonic() + self._timeout
        while True:
            status = _typed(self.execute("guest-exec-status", pid=started.get("pid")), dict)
            if status.get("exited"):
                return int(status.get("exitcode", -1)), _bytes(status.get("out-data", ""))
            if time.monotonic() > deadline:
                raise UnreachableError(f"{path} did not end inside the guest within {self._timeout:g} s")
            time.sleep(_POLL_S)

    def read_file(self, path: str, chunk: int) -> Iterator[bytes]:
        """The content of a file of the guest's, ``chunk`` bytes at a time, until its end or the caller has enough.

        :raise GuestAgentError: it cannot be opened; others as :meth:`execute`.
        """
        handle = self.execute("guest-file-open", path=path, mode="r")
        try:
            while True:
                answer = _typed(self.execute("guest-file-read", handle=handle, count=chunk), dict)
                data = _bytes(answer.get("buf-b64", ""))
                if len(data) > chunk:
                    raise PeerError(f"{path}: the guest agent sent {len(data)} bytes where {chunk} were asked for")
                if data:
                    yield data
                if answer.get("eof") or not data:
                    return
        finally:
            self.execute("guest-file-close", handle=handle)


def _typed(value: Any, kind: type[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(value, kind):
        raise PeerError(f"the guest agent answered {value!r:.60} where an object was due")
    return value


def _bytes(text: object) -> bytes:
    try:
        return binascii.a2b_base64(str(text), strict_mode=True) if text else b""
    except binascii.Error as error:
        raise PeerError(f"the guest agent sent data that is no base64: {error}") from error
