"""Real guests move over several streams, and prove every page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.cluster import Vm, summary_of, wait_for
from tests.support.cutting import cut

pytestmark = pytest.mark.slow


def moved(vm: Vm, *options: str) -> dict[str, Any]:
    """Move it to b; the summary."""
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "-o", "ndjson", "--max-downtime", "1s", *options)
    assert done.returncode == 0, done.stderr + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    vm.verify("b")
    return summary_of(done.stdout)


@pytest.mark.parametrize("method", ["enlightened", "pre-copy"])
def test_a_guest_moves_over_four_streams(vm: Vm, method: str) -> None:
    summary = moved(vm, f"--{method}", "--streams", "4", "--verify")
    assert summary["verified"] is True
    assert summary["streams"] == 4
    if method in ("post-copy", "enlightened"):
        sent = summary["data_pages"] + summary["zero_pages"] + summary["urgent_pages"]
        assert sent <= summary["pages"] - summary["never_sent_pages"] + summary["resent_pages"], "a page crossed twice"


def test_rounds_of_changes_over_four_streams_lose_nothing(vm: Vm) -> None:
    slow = ("--max-bandwidth", "40MB", "--compress", "lz4")
    summary = moved(vm, "--pre-copy", "--streams", "4", *slow, "--verify")
    assert summary["verified"] is True
    assert summary["changed_pages"] > 0, summary


@pytest.mark.parametrize("end", ["a"])
def test_three_streams_break_off_and_are_three_again(vm: Vm, end: str) -> None:
    process = vm.cluster.a.popen(
        "migrate", vm.name, "b", "-o", "ndjson", "--post-copy", "--max-bandwidth", "10MB", "--streams", "3"
    )
    assert process.stdout is not None
    cuts: list[int] = []
    lines = []
    for line in process.stdout:
        lines.append(line)
        if '"state":"postcopy"' in line and len(cuts) < 2 and (not cuts or '"recovering"' in "".join(lines)):
            cuts.append(cut(vm.cluster.hosts[end].engine()))
    process.communicate()
    assert cuts, lines[-1]
    # The first that is cut may have the engine close the others sooner than they are cut.
    assert all(cuts)
    assert any(json.loads(line)["state"] == "recovering" for line in lines)
    summary = summary_of(lines[-1])
    assert (summary["state"], summary["streams"]) == ("completed", 3)
    wait_for(lambda: not vm.cluster.a.has(vm.name), "the end of the source's QEMU")
    vm.verify("b")


def test_cancel_with_several_streams_leaves_the_vm_at_the_source(vm: Vm) -> None:
    process = vm.cluster.a.popen(
        "migrate", vm.name, "b", "-o", "ndjson", "--pre-copy", "--max-bandwidth", "10MB", "--streams", "4"
    )
    assert process.stdout is not None
    cancelled = False
    for line in process.stdout:
        if '"state":"copying"' in line and not cancelled:
            cancelled = vm.cluster.a.outboard("cancel", vm.name).returncode == 0
    process.communicate()
    assert (cancelled, process.returncode) == (True, 5)
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    assert vm.cluster.a.has(vm.name)
    vm.verify("a")
