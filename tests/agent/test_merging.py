"""Sharing left to the kernel: real processes are told, by the command as people give it, and everything is undone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from outboard.agent import merging
from outboard.agent.merging import Merged
from outboard.cli.sharing import sharing
from outboard.errors import KernelError, NotFoundError, OutboardError, RefusedError
from outboard.linux import ksm, proc
from outboard.sharing.ksm import let_merge
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_anonymous
from tests.support.machine import ksmd
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target

MIB = 1 << 20
SUM = 1024 * 1023 // 2


@pytest.fixture
def targets() -> Iterator[list[Target]]:
    require("root", "ksm")
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(ksmd())
        yield [until_end.enter_context(Target("anon", mebibytes=4)) for _ in range(2)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTBOARD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("OUTBOARD_CONFIG_DIR", str(tmp_path))
    return tmp_path / "run"


def mergeable(target: Target) -> list[int]:
    """Where mappings begin that the kernel may merge."""
    return [
        one.start
        for one in proc.maps(target.pid)
        if "mg" in proc.smaps(target.pid, one.start).get("VmFlags", "").split()
    ]


def command(*words: str) -> Result:
    return CliRunner().invoke(sharing, list(words))


def starting(targets: Sequence[Target]) -> list[str]:
    return ["start", "blue", "--backend", "ksm", *(f"--process={one.pid}" for one in targets)]


def test_equal_memory_is_merged_told_and_parted(targets: list[Target], root: Path) -> None:
    done = command(*starting(targets))
    assert done.exit_code == 0, done.output
    assert "the kernel merges what 2 processes have in common" in done.output
    assert all(mergeable(one) for one in targets)
    deadline = time.monotonic() + 60
    while (told := merging.told(root, "blue")).shared < 2 * 1000 * 4096:
        assert time.monotonic() < deadline, told
        time.sleep(0.01)
    assert (told.backend, told.process, told.shareable, told.scan_rate) == ("ksm", 0, None, None)
    assert told.scanned >= 8 * MIB
    assert told.saved == max(0, told.shared - told.pool)
    assert [one.failure for one in told.members] == [None, None]
    shown = command("status", "blue")
    assert "blue: " in shown.output
    assert "merged by the kernel (KSM)" in shown.output
    found = json.loads(command("status", "-o", "json").output)
    assert (found["schema"], found["backend"], len(found["members"])) == ("outboard.sharing.v1", "ksm", 2)
    # One domain at a time, whoever asks.
    for again in (command(*starting(targets)), command("start", "blue")):
        assert isinstance(again.exception, RefusedError)
    assert targets[0].ask("w 7 70") == "written"
    done = command("stop", "blue")
    assert done.output == "blue shares nothing any more\n", done.exception
    assert [mergeable(one) for one in targets] == [[], []]
    assert [one.ask("t").split()[1] for one in targets] == [str(SUM + 63), str(SUM)]
    while any(ksm.statistics(one.pid).merged for one in targets):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list(root.iterdir())
    assert isinstance(command("stop", "blue").exception, NotFoundError)


def test_what_the_kernel_has_no_notion_of_is_refused(targets: list[Target], root: Path) -> None:
    for option in ("--every=3", "--reads=1", "--break-below=1GiB", "--rebuild-above=2GiB"):
        done = command(*starting(targets), option)
        assert done.exception is not None
        assert "is nothing that --backend ksm could follow" in str(done.exception)
    assert "is for --backend ksm" in str(command("start", "blue", f"--process={targets[0].pid}").exception)
    with Target(mebibytes=4) as shared, guest_of(shared) as guest:
        with pytest.raises(RefusedError, match="anonymous memory only"):
            merging.begin(root, "blue", [guest])
        assert "no VM named blue" in str(command("start", "blue", "--backend", "ksm").exception)
    assert isinstance(command("start", "blue", "--backend=ksm", "--process=4194303").exception, NotFoundError)
    assert (merging.merging(root), [mergeable(one) for one in targets]) == (None, [[], []])
    with pytest.raises(NotFoundError, match="merges nothing of blue"):
        merging.told(root, "blue")


def test_what_a_process_said_itself_stays_said(targets: list[Target], root: Path) -> None:
    with attach_anonymous(targets[0].pid) as guest:
        merging.begin(root, "first", [guest])
    # As if it had said so before anybody came.
    (root / "ksm.json").unlink()
    before = mergeable(targets[0])
    guests: list[Guest] = [attach_anonymous(one.pid) for one in targets]
    merging.begin(root, "blue", guests)
    merging.end(root, "blue")
    for guest in guests:
        guest.close()
    assert (mergeable(targets[0]), mergeable(targets[1])) == (before, [])


def test_who_cannot_be_told_leaves_nobody_told(
    targets: list[Target], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = let_merge

    def refuse(pid: int, thread: int, spans: list[tuple[int, int]]) -> None:
        if pid == targets[1].pid:
            raise KernelError("madvise(MERGEABLE)", 12)
        tell(pid, thread, spans)

    monkeypatch.setattr(merging, "let_merge", refuse)
    with (
        attach_anonymous(targets[0].pid) as one,
        attach_anonymous(targets[1].pid) as two,
        pytest.raises(KernelError, match="MERGEABLE"),
    ):
        merging.begin(root, "blue", [one, two])
    assert (merging.merging(root), mergeable(targets[0])) == (None, [])


def test_a_process_that_ends_is_told_of_and_in_nobody_s_way(targets: list[Target], root: Path) -> None:
    with attach_anonymous(targets[0].pid) as one, attach_anonymous(targets[1].pid) as two:
        merging.begin(root, "blue", [one, two])
    targets[1].__exit__(None, None, None)
    ksm.setting("run", 0)
    told = merging.told(root, "blue")
    assert [one.failure for one in told.members] == ["ksmd is off: /sys/kernel/mm/ksm/run is not 1", "it has ended"]
    merging.end(root, "blue")
    assert mergeable(targets[0]) == []


def test_two_at_once_are_one_after_the_other(root: Path) -> None:
    merging._keep(Merged("red", []), root)
    with pytest.raises(OutboardError, match="merges the memory of red already"):
        merging._keep(Merged("blue", []), root)
    assert [path.name for path in root.iterdir()] == ["ksm.json"]


def test_a_process_without_anonymous_memory(root: Path) -> None:  # noqa: ARG001  # its directories
    with pytest.raises(NotFoundError, match="there is no process"):
        attach_anonymous(4194303)
