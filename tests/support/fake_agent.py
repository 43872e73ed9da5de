"""A guest agent for tests: honest by default, and a liar on request. It passes the real one's contract suite."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

Twist = Callable[[str, bytes], bytes | None]
"""Given a command and the honest answer, what is sent instead; None for nothing, ever."""

_PIPELINE = re.compile(r"dd if=(\S+) bs=(\d+) skip=(\d+) count=(\d+) 2>/dev/null \| gzip -1")


def honest(_command: str, answer: bytes) -> bytes:
    return answer


class FakeAgent:
    """Listens at ``path`` like QEMU's end of the port, for one client after another.

    :param files: of its guest, by path.
    :param disabled: commands that it refuses.
    :param stale: what an earlier client has left in the pipe.
    """

    def __init__(
        self,
        path: Path,
        files: dict[str, bytes],
        *,
        disabled: frozenset[str] = frozenset(),
        stale: bytes = b"",
        twist: Twist = honest,
    ) -> None:
        self.commands: list[str] = []
        self._files = files
        self._disabled = disabled
        self._stale = stale
        self._twist = twist
        self._open: dict[int, tuple[bytes, int]] = {}
        self._ended: dict[int, dict[str, object]] = {}
        self._stop = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(0.02)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> FakeAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(0.02)
                try:
                    client.sendall(self._stale)
                    self._talk(client)
                except OSError:
                    continue

    def _talk(self, client: socket.socket) -> None:
        rest = b""
        while not self._stop.is_set():
            try:
                part = client.recv(65536)
            except TimeoutError:
                continue
            if not part:
                return
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._reply(client, line)

    def _reply(self, client: socket.socket, line: bytes) -> None:
        request = json.loads(line.rpartition(b"\xff")[2])
        command = request["execute"]
        self.commands.append(command)
        try:
            answer: dict[str, object] = {"return": self._do(command, request.get("arguments", {}))}
        except (LookupError, OSError) as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        mark = b"\xff" if command == "guest-sync-delimited" else b""
        twisted = self._twist(command, mark + json.dumps(answer).encode() + b"\n")
        client.settimeout(5)
        while twisted:
            client.sendall(twisted)
            if self._stop.is_set() or not twisted.endswith(b"..."):
                break
        client.settimeout(0.02)

    def _do(self, command: str, arguments: dict[str, Any]) -> object:
        if command in self._disabled:
            raise LookupError(f"The command {command} has been disabled for this instance")
        match command:
            case "guest-sync-delimited":
                return arguments["id"]
            case "guest-file-open":
                self._open[len(self._open)] = self._files[arguments["path"]], 0
                return len(self._open) - 1
            case "guest-file-read":
                data, at = self._open[arguments["handle"]]
                piece = data[at : at + arguments["count"]]
                self._open[arguments["handle"]] = data, at + len(piece)
                text = base64.b64encode(piece).decode()
                return {"count": len(piece), "buf-b64": text, "eof": len(piece) < arguments["count"]}
            case "guest-file-seek":
                data, _ = self._open[arguments["handle"]]
                self._open[arguments["handle"]] = data, arguments["offset"]
                return {"position": arguments["offset"], "eof": False}
            case "guest-file-close":
                self._open[arguments["handle"]] = b"", 0
                return {}
            case "guest-exec":
                self._ended[len(self._ended)] = self._run(arguments["path"], arguments["arg"])
                return {"pid": len(self._ended) - 1}
            case "guest-exec-status":
                return self._ended[arguments["pid"]]
        raise LookupError(f"The command {command} has not been found")

    def _run(self, path: str, arguments: list[str]) -> dict[str, object]:
        status = 0
        if path == "/bin/echo":
            out = " ".join(arguments).encode() + b"\n"
        elif path == "/bin/sh" and arguments == ["-c", "exit 3"]:
            out, status = b"", 3
        elif path == "/bin/sh" and (match := _PIPELINE.search(arguments[1])):
            block, skip, count = (int(match[group]) for group in (2, 3, 4))
            data = self._files.get(match[1], b"")
            out = gzip.compress(data[block * skip : block * (skip + count)], 1)
        else:
            raise OSError(f"Failed to execute child process {path} (No such file or directory)")
        answer: dict[str, object] = {"exited": True, "exitcode": status}
        return answer | ({"out-data": base64.b64encode(out).decode()} if out else {})
