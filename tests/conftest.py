"""What every test is held to: the processes that it starts end with it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from outboard.errors import KernelError
from outboard.linux import proc

# How long an example takes says more about the machine than about what is tested.
settings.register_profile("outboard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("outboard")

_HELPERS = "multiprocessing.resource_tracker"
"""Python's own, started once for the whole session."""


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        # A thread may end between the two looks.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def _command_of(pid: int) -> str:
    try:
        return " ".join(proc.command_line(pid))
    except KernelError:
        return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that boot guests come first; last those that kill engines again and again, and keep what these had open."""
    items.sort(key=lambda item: {"vm": 0, "faults": 2}.get(item.path.parent.name, 1))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_kept_open() -> Iterator[None]:
    """Arrays over files keep a descriptor each until they are collected, and select(2) knows no more than 1,024."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """End the processes that a test left running, each by its number, and fail the test."""
    before = _children()
    yield
    left = []
    for pid in _children() - before:
        # A zombie has no command line: it is for whoever started it to wait for.
        command = _command_of(pid)
        if command and _HELPERS not in command:
            os.kill(pid, signal.SIGKILL)
            left.append(f"{pid} {command}")
    assert not left, f"still running at the test's end: {left}"
