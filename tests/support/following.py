"""Following a migration as its command tells of it: a thread reads, and notes when each report came."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from outboard.migrate.states import State
from tests.support.cluster import Host


class Follower:
    """``outboard migrate ARGUMENTS`` on ``host``, and its reports; a context manager that ends the command.

    Synchronization: any thread.
    """

    def __init__(self, host: Host, *arguments: str) -> None:
        self.reports: list[tuple[float, dict[str, Any]]] = []
        """Each with the moment, CLOCK_MONOTONIC, when it came."""
        self._news = threading.Condition()
        self._over = False
        self._process = host.popen("migrate", *arguments, "-o", "ndjson")
        self._thread = threading.Thread(target=self._read, daemon=True, name="follower")
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.reports.append((time.monotonic(), json.loads(line)))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    @property
    def over(self) -> bool:
        """Whether the command has said its last."""
        return self._over

    def states(self) -> list[State]:
        """The states so far, each once for as long as it lasted."""
        seen: list[State] = []
        for _, report in list(self.reports):
            state = State(report["state"])
            if not seen or seen[-1] is not state:
                seen.append(state)
        return seen

    def last_state(self) -> State | None:
        """The state in which it ended; None: nobody was told of its end."""
        told = [report for _, report in self.reports if report["schema"] == "outboard.migration.summary.v1"]
        return State(told[-1]["state"]) if told else None

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Wait until ``condition``, looked at with each report, holds."""
        with self._news:
            came = self._news.wait_for(lambda: condition() or self._over, timeout)
        assert came, f"{what} did not come about within {timeout} s: {self.states()}"
        assert condition(), f"the migration ended before {what}: {self.states()}, {self.said()}"

    def wait_state(self, state: State, timeout: float = 60) -> None:
        """Wait until it has been in ``state``."""
        self.wait(lambda: state in self.states(), state.value, timeout)

    def end(self, timeout: float = 120) -> int:
        """Wait for the command's end; its exit code."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"the migration does not end: {self.states()}, {self.said()}"
        return self._process.wait(timeout)

    def repaired(self, struck: float) -> float | None:
        """How long after ``struck`` the VM was seen to again: its streams were open, or it was said to be the source's.

        None when the command was not told, or nothing had broken.
        """
        broken = False
        for moment, report in self.reports:
            state = State(report["state"])
            if moment < struck or (report["schema"].endswith("progress.v1") and state is State.COMMITTED):
                continue
            broken = broken or state is State.RECOVERING
            if state in (State.FAILED, State.CANCELLED) or (broken and state in (State.POSTCOPY, State.COMPLETED)):
                return moment - struck
        return None

    def said(self) -> str:
        """What it wrote for people, once it has ended, and its last words until then."""
        if not self._over:
            return str(self.reports[-1][1].get("verdict", "")) if self.reports else ""
        assert self._process.stderr is not None
        if not self._process.stderr.closed:
            self._words = self._process.stderr.read()
            self._process.stderr.close()
        return self._words

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_exc: object) -> None:
        # Also of a test that fails.
        self._process.kill()
        self._thread.join()
        self.said()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
