"""The stock guest agent (qemu-ga), over its virtio-serial socket.

A guest is not trusted: every answer has a deadline, a size and a type, and one that has not ends the conversation. The
protocol is QMP's, one JSON object a line, without a greeting; ``guest-sync-delimited`` first throws away what an
earlier client may have left in the pipe. Source: QEMU's qga/qapi-schema.json.
"""

from __future__ import annotations

import binascii
import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from outboard.errors import OutboardError, PeerError, UnreachableError
from outboard.vmm import sockets

_MOST = 4 << 20
"""Bytes of one answer: a megabyte of a file in base64, and room."""
_POLL_S = 0.02
"""How often a program in the guest is asked for. Each question costs a guest under TCG a millisecond or two, of the one
processor that the program would have."""
_NEVER = float("inf")
T = TypeVar("T")


class GuestAgentError(OutboardError):
    """The agent refused a command, in its own words."""


class _Refusal(msgspec.Struct):
    desc: str = "no reason given"


class _Answer(msgspec.Struct):
    result: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Refusal | None = None


class _Started(msgspec.Struct):
    pid: int


class _Status(msgspec.Struct, rename="kebab"):
    exited: bool
    exitcode: int = -1
    out_data: str = ""
    out_truncated: bool = False


class _Read(msgspec.Struct, rename={"data": "buf-b64"}):
    eof: bool
    data: str = ""


class GuestAgent:
    """A conversation with the guest agent behind the unix socket ``path``.

    Once an answer was late, too long or none, the conversation is over: every later call raises UnreachableError at
    once. A command that the agent refused leaves it as it was.

    :param timeout: seconds that any one answer may take, and the synchronisation at the start.
    :raise UnreachableError: no agent answers there.
    :raise PeerError: what answers is no guest agent.

    Synchronization: one thread.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._rest = b""
        self._over = False
        deadline = time.monotonic() + timeout
        self._socket = sockets.connect(path, timeout, "the guest agent's port")
        try:
            self._synchronise(deadline)
        except OutboardError:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        self._over = True

    def __enter__(self) -> GuestAgent:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _synchronise(self, deadline: float) -> None:
        number = secrets.randbelow(1 << 31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        # The delimiter makes the agent forget half a command of an earlier client's, too.
        self._send(b"\xff" + msgspec.json.encode(request) + b"\n", deadline)
        while True:
            self._until(b"\xff", deadline)
            # An earlier client's synchronisation may still be in the pipe.
            with contextlib.suppress(GuestAgentError):
                if self._answer("guest-sync-delimited", int, deadline) == number:
                    return

    def _end(self, error: OutboardError) -> OutboardError:
        self._over = True
        return error

    def _send(self, data: bytes, deadline: float) -> None:
        if self._over:
            raise UnreachableError(f"the conversation with the guest agent at {self._path} is over")
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(data)
        except OSError as error:
            raise self._end(UnreachableError(f"the guest agent at {self._path} takes no command: {error}")) from error

    def _until(self, mark: bytes, deadline: float) -> bytes:
        """What comes before ``mark``; what follows it is kept."""
        parts = [self._rest]
        size = len(self._rest)
        while mark not in parts[-1]:
            left = deadline - time.monotonic()
            try:
                self._socket.settimeout(max(left, 0.001))
                part = self._socket.recv(1 << 18) if left > 0 else None
            except TimeoutError:
                part = None
            except OSError as error:
                raise self._end(UnreachableError(f"the guest agent at {self._path} is gone: {error}")) from error
            if part is None:
                raise self._end(
                    UnreachableError(
                        f"the guest agent at {self._path} did not answer in time; is qemu-ga running in the guest, and "
                        "nobody else connected to its socket?"
                    )
                )
            if not part:
                raise self._end(UnreachableError(f"the guest agent at {self._path} hung up"))
            parts.append(part)
            size += len(part)
            if size > _MOST:
                raise self._end(
                    PeerError(f"the guest agent at {self._path} sent more than {_MOST >> 20} MiB for one answer")
                )
        before, _, self._rest = b"".join(parts).partition(mark)
        return before

    def _answer(self, command: str, kind: type[T], deadline: float) -> T:
        line = self._until(b"\n", deadline)
        try:
            answer = msgspec.json.decode(line, type=_Answer)
            if answer.error is not None:
                raise GuestAgentError(f"{command}: the guest agent says: {_printable(answer.error.desc)}")
            if isinstance(answer.result, msgspec.UnsetType):
                raise self._end(PeerError(f"{command}: the guest agent at {self._path} answered without a result"))
            return msgspec.json.decode(answer.result, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise self._end(
                PeerError(f"{command}: the guest agent at {self._path} answered what is none: {_printable(str(error))}")
            ) from error

    def execute(self, command: str, kind: type[T], *, deadline: float = _NEVER, **arguments: object) -> T:
        """Execute one of the agent's commands.

        :param kind: the type that its answer must have.
        :param deadline: on the monotonic clock; the conversation's timeout counts all the same.
        :raise GuestAgentError: it refused. :raise PeerError: its answer is none. :raise UnreachableError: no answer.
        """
        deadline = min(deadline, time.monotonic() + self._timeout)
        self._send(msgspec.json.encode({"execute": command, "arguments": arguments}) + b"\n", deadline)
        return self._answer(command, kind, deadline)

    def run(self, path: str, *arguments: str, deadline: float = _NEVER) -> tuple[int, bytes]:
        """Run a program inside the guest and wait for its end: exit status and standard output.

        :param deadline: on the monotonic clock; the conversation's timeout counts all the same.
        :raise GuestAgentError: there is no such program, or exec is disabled; others as :meth:`execute`.
        """
        deadline = min(deadline, time.monotonic() + self._timeout)
        options = {"path": path, "arg": arguments, "capture-output": True}
        pid = self.execute("guest-exec", _Started, deadline=deadline, **options).pid
        while True:
            time.sleep(min(_POLL_S, max(deadline - time.monotonic(), 0)))
            status = self.execute("guest-exec-status", _Status, deadline=deadline, pid=pid)
            if status.out_truncated:
                raise self._end(PeerError(f"{path} wrote more inside the guest than its agent keeps"))
            if status.exited:
                return status.exitcode, self._decoded(status.out_data)

    def read_file(self, path: str, chunk: int, *, skip: int = 0, deadline: float = _NEVER) -> Iterator[bytes]:
        """The content of a file of the guest's, ``chunk`` bytes at a time, until its end or the caller has enough.

        :param skip: where to begin, in bytes.
        :param deadline: on the monotonic clock.
        :raise GuestAgentError: it cannot be opened; others as :meth:`execute`.
        """
        handle = self.execute("guest-file-open", int, deadline=deadline, path=path, mode="r")
        try:
            if skip:
                where = {"handle": handle, "offset": skip, "whence": "set"}
                self.execute("guest-file-seek", msgspec.Raw, deadline=deadline, **where)
            while True:
                answer = self.execute("guest-file-read", _Read, deadline=deadline, handle=handle, count=chunk)
                data = self._decoded(answer.data)
                if len(data) > chunk:
                    raise self._end(
                        PeerError(f"{path}: the guest agent sent {len(data)} bytes where {chunk} were asked")
                    )
                if data:
                    yield data
                if answer.eof or not data:
                    return
        finally:
            if not self._over:
                with contextlib.suppress(OutboardError):
                    self.execute("guest-file-close", msgspec.Raw, deadline=deadline, handle=handle)

    def _decoded(self, text: str) -> bytes:
        try:
            return binascii.a2b_base64(text, strict_mode=True) if text else b""
        except ValueError as error:
            raise self._end(PeerError(f"the guest agent at {self._path} sent what is no base64: {error}")) from error


def _printable(text: str) -> str:
    """A guest's words for a message: short, and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])
