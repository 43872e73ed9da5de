"""Carrying page flags out of a guest whose agent is a fake, honest and otherwise."""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.errors import OutboardError, PeerError, UnreachableError
from outboard.vmm import kpageflags
from outboard.vmm.guest_agent import GuestAgent, GuestAgentError
from tests.support.fake_agent import FakeAgent, Twist, honest

MIB = 256
FLAGS = np.random.default_rng(3).integers(0, 1 << 40, 5000 * MIB, dtype=np.uint64) & np.uint64(0x1400000060)
"""Of a guest with 5000 MiB of frames."""
RUN = frozenset({"guest-exec"})
READ = frozenset({"guest-file-open"})


def serve(path: Path, content: bytes, disabled: frozenset[str] = frozenset(), twist: Twist = honest) -> FakeAgent:
    return FakeAgent(path / "agent", {kpageflags.PATH: content}, disabled=disabled, twist=twist)


def take(path: Path, ranges: list[tuple[int, int]], seconds: float = 20) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    with GuestAgent(path / "agent", seconds) as agent:
        yield from kpageflags.read(agent, ranges, deadline=time.monotonic() + seconds)


@pytest.mark.parametrize("disabled", [frozenset(), RUN])
@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 64 * MIB)],
        [(0, 512 * MIB + 1)],
        [(0, 2048 * MIB), (4096 * MIB, 700 * MIB)],
        [(0, 1), (3 * MIB + 7, 10)],
    ],
)
def test_exactly_what_is_asked_for_comes(
    tmp_path: Path, disabled: frozenset[str], ranges: list[tuple[int, int]]
) -> None:
    wanted = np.zeros(FLAGS.size, dtype=bool)
    for first, count in ranges:
        wanted[first : first + count] = True
    found = np.zeros(FLAGS.size, dtype=bool)
    with serve(tmp_path, FLAGS.tobytes(), disabled):
        for first, flags in take(tmp_path, ranges):
            assert np.array_equal(flags, FLAGS[first : first + flags.size])
            found[first : first + flags.size] = True
    assert not np.any(wanted & ~found)
    # No more than a block before each range.
    assert np.count_nonzero(found & ~wanted) < 8192 * len(ranges)


@pytest.mark.parametrize("disabled", [frozenset(), RUN])
def test_a_guest_whose_memory_ends_early(tmp_path: Path, disabled: frozenset[str]) -> None:
    for end in (0, 1, 64 * MIB - 32, 512 * MIB, 512 * MIB + 5):
        with serve(tmp_path, FLAGS[:end].tobytes(), disabled):
            parts = list(take(tmp_path, [(0, 2048 * MIB), (4096 * MIB, 10)]))
        (tmp_path / "agent").unlink()
        assert sum(flags.size for _, flags in parts) == end
        assert np.array_equal(np.concatenate([np.empty(0, np.uint64)] + [flags for _, flags in parts]), FLAGS[:end])


def test_early_pieces_are_small_so_that_work_can_begin(tmp_path: Path) -> None:
    with serve(tmp_path, FLAGS.tobytes()):
        sizes = [flags.size // MIB for _, flags in take(tmp_path, [(0, 5000 * MIB)])]
    assert sizes == [128, 512, 2048, 2312]


def test_an_agent_that_runs_nothing_and_reads_nothing(tmp_path: Path) -> None:
    with serve(tmp_path, FLAGS.tobytes(), RUN | READ), pytest.raises(GuestAgentError, match="guest-file-open"):
        list(take(tmp_path, [(0, 64 * MIB)]))


def test_a_guest_without_gzip_is_read_by_file(tmp_path: Path) -> None:
    def without_gzip(command: str, answer: bytes) -> bytes:
        return b'{"return": {"exited": true, "exitcode": 127}}\n' if command == "guest-exec-status" else answer

    with serve(tmp_path, FLAGS[: 64 * MIB].tobytes(), twist=without_gzip) as fake:
        assert sum(flags.size for _, flags in take(tmp_path, [(0, 64 * MIB)])) == 64 * MIB
        assert "guest-file-read" in fake.commands


def program_says(out: bytes) -> Twist:
    answer = {"return": {"exited": True, "exitcode": 0, "out-data": base64.b64encode(out).decode()}}
    line = json.dumps(answer).encode() + b"\n"
    return lambda command, proper: line if command == "guest-exec-status" else proper


@pytest.mark.parametrize(
    "out",
    [
        b"no gzip at all",
        gzip.compress(bytes(1 << 20))[:-9],
        gzip.compress(bytes(1 << 30), 9),
        gzip.compress(bytes((1 << 20) + 8)),
        gzip.compress(bytes(1001)),
        gzip.compress(bytes(1 << 19))[:40] + b"\xff" * 200,
    ],
    ids=["garbage", "truncated", "bomb", "long", "odd", "broken"],
)
def test_a_program_that_lies(tmp_path: Path, out: bytes) -> None:
    began = time.monotonic()
    with serve(tmp_path, b"", twist=program_says(out)), pytest.raises(PeerError, match="the guest's /proc/kpageflags"):
        list(take(tmp_path, [(0, 512 * MIB)]))
    assert time.monotonic() - began < 10


def test_a_program_that_hangs(tmp_path: Path) -> None:
    began = time.monotonic()
    twist: Twist = lambda command, proper: (  # noqa: E731
        b'{"return": {"exited": false}}\n' if command == "guest-exec-status" else proper
    )
    with serve(tmp_path, b"", twist=twist), pytest.raises(UnreachableError):
        list(take(tmp_path, [(0, 512 * MIB)], seconds=0.5))
    assert time.monotonic() - began < 10


def test_an_agent_that_changes_its_mind(tmp_path: Path) -> None:
    """What was told counts; then it is an error, not the same again by file."""
    asked = 0

    def once(command: str, answer: bytes) -> bytes:
        nonlocal asked
        asked += command == "guest-exec"
        return b'{"error": {"desc": "enough"}}\n' if command == "guest-exec" and asked > 1 else answer

    with serve(tmp_path, FLAGS.tobytes(), twist=once):
        told = take(tmp_path, [(0, 2048 * MIB)])
        assert next(told)[1].size == 128 * MIB
        with pytest.raises(OutboardError, match="enough"):
            next(told)
