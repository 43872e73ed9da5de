"""Real guests move with their pages packed, referred to and sent as changes, and prove every page."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.cluster import Vm, summary_of, wait_for
from tests.support.cutting import cut

pytestmark = pytest.mark.slow

SLOW = ("--max-bandwidth", "30MB")


def moved(vm: Vm, *options: str) -> dict[str, Any]:
    """Move it to b; the summary."""
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "-o", "ndjson", "--max-downtime", "1s", *options)
    assert done.returncode == 0, done.stderr + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    vm.verify("b")
    return summary_of(done.stdout)


@pytest.mark.parametrize(
    ("method", "codec"), [("enlightened", "lz4"), ("post-copy", "zstd"), ("pre-copy", "zstd"), ("hybrid", "lz4")]
)
def test_pages_go_packed(vm: Vm, method: str, codec: str) -> None:
    summary = moved(vm, f"--{method}", "--compress", codec)
    # 64 MiB of what the guest writes are noise, the kernel and its programs are not.
    assert summary["packed_bytes"] < summary["content_bytes"] - (8 << 20)
    assert summary["codecs"][{"lz4": "lz4", "zstd": "zstd-1"}[codec]] > 0
    assert summary["codec_s"] > 0
    went_whole = sum(summary["codecs"].values())
    told = summary["reference_pages"] + summary["changed_pages"]
    assert went_whole + told == summary["data_pages"]


def test_what_is_written_again_goes_as_changes(vm: Vm) -> None:
    summary = moved(vm, "--pre-copy", *SLOW, "--compress", "lz4", "--verify")
    assert summary["verified"] is True
    assert summary["changed_pages"] > 0, summary


def test_auto_packs_for_a_slow_link_and_says_what_it_gained(vm: Vm) -> None:
    done = vm.cluster.a.outboard("migrate", vm.name, "b", *SLOW)
    assert done.returncode == 0, done.stderr
    words = next(line for line in done.stdout.splitlines() if line.startswith("content"))
    assert "pages by" in words
    vm.verify("b")


def test_none_sends_pages_as_they_are(vm: Vm) -> None:
    summary = moved(vm, "--pre-copy", *SLOW, "--compress", "none")
    assert list(summary["codecs"]) == ["none"]
    assert summary["content_bytes"] == summary["packed_bytes"]
    assert summary["changed_pages"] == summary["reference_pages"] == 0


@pytest.mark.parametrize("end", ["b"])
def test_streams_that_are_opened_again_begin_anew(vm: Vm, end: str) -> None:
    process = vm.cluster.a.popen(
        "migrate", vm.name, "b", "-o", "ndjson", "--post-copy", "--max-bandwidth", "10MB", "--compress", "zstd"
    )
    assert process.stdout is not None
    cuts = 0
    lines = []
    for line in process.stdout:
        lines.append(line)
        if '"state":"postcopy"' in line and not cuts:
            cuts = cut(vm.cluster.hosts[end].engine())
    process.communicate()
    assert cuts, lines[-1]
    assert any('"state":"recovering"' in line for line in lines)
    summary = summary_of(lines[-1])
    assert summary["state"] == "completed"
    assert summary["codecs"]["zstd-1"] > 0
    wait_for(lambda: not vm.cluster.a.has(vm.name), "the end of the source's QEMU")
    vm.verify("b")
