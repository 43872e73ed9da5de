"""How many streams: by the processors, the link and the user."""

from __future__ import annotations

import os

import pytest

from outboard.errors import KernelError
from outboard.linux import interfaces
from outboard.migrate.method import Options
from outboard.migrate.streams import suggested


def on(monkeypatch: pytest.MonkeyPatch, processors: int, speed: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    monkeypatch.setattr(interfaces, "towards", lambda _: "eth0")
    monkeypatch.setattr(interfaces, "speed", lambda _: speed)


@pytest.mark.parametrize(
    ("processors", "speed", "limit", "streams"),
    [
        (1, None, None, 1),
        (2, None, None, 1),
        (4, None, None, 2),
        (64, None, None, 4),
        (64, 100_000_000_000, None, 4),
        (64, 1_000_000_000, None, 1),
        (64, 10_000_000_000, 125_000_000, 1),
        (64, 10_000_000_000, 250_000_000, 4),
    ],
)
def test_half_the_processors_where_the_link_is_fast(
    monkeypatch: pytest.MonkeyPatch, processors: int, speed: int | None, limit: int | None, streams: int
) -> None:
    on(monkeypatch, processors, speed)
    assert suggested(Options(max_bandwidth=limit), "192.0.2.1") == streams


def test_an_interface_that_is_not_to_be_seen_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 8, None)

    def gone(name: str) -> int | None:
        raise KernelError(f"read of the speed of {name}", 2)

    monkeypatch.setattr(interfaces, "speed", gone)
    assert suggested(Options(), "192.0.2.1") == 4
