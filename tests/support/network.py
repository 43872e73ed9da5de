"""A network namespace of a test's own, with a bridge in it."""

from __future__ import annotations

import secrets
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pyroute2 import netns

T = TypeVar("T")


class Network:
    """A namespace whose bridge "guests" has the address 10.77.0.1/24; a context manager that removes it."""

    def __init__(self) -> None:
        self.name = f"outboard-test-{secrets.token_hex(4)}"

    def ip(self, *arguments: str) -> str:
        """Run ip(8) in the namespace; what it printed."""
        command = ["ip", "-n", self.name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that is inside."""
        answers: list[T] = []
        failures: list[BaseException] = []

        def inside() -> None:
            try:
                netns.pushns(self.name)
                answers.append(function())
            except BaseException as error:  # noqa: BLE001 (handed to the caller's thread)
                failures.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
        return answers[0]

    def __enter__(self) -> Network:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        try:
            self.ip("link", "set", "lo", "up")
            self.ip("link", "add", "guests", "type", "bridge", "forward_delay", "0")
            self.ip("address", "add", "10.77.0.1/24", "dev", "guests")
            self.ip("link", "set", "guests", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], check=True)
        assert not Path("/run/netns", self.name).exists()
