"""Guests in large pages: they stay in large pages, and lose nothing, by every method."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from guest.build import Image
from outboard.pages import LARGE
from outboard.vmm.large_pages import large_mappings
from tests.support.cluster import Cluster, Vm, summary_of, wait_for
from tests.support.machine import huge_pages, transparent_huge_pages
from tests.support.requirements import require

pytestmark = pytest.mark.slow

_MIB = 128


@pytest.fixture(params=["hugetlb", "thp"])
def vm(request: pytest.FixtureRequest, cluster: Cluster, image: Image) -> Iterator[Vm]:
    """A VM on host a in large pages of either kind, its guest writing 2,000 pages/s of 16 MiB."""
    require("pagemap-scan")
    # Of both hosts at once, and of one more that is refused.
    with huge_pages(2 * _MIB // 2) if request.param == "hugetlb" else transparent_huge_pages():
        size = "2MiB" if request.param == "hugetlb" else "4KiB"
        made = Vm(cluster, image, f"vm-{secrets.token_hex(3)}", _MIB, page_size=size)
        made.write(16, 2000)
        yield made
        for host in cluster.hosts.values():
            if host.has(made.name):
                host.outboard("stop", made.name)


def large(vm: Vm, host: str) -> int:
    with vm.record(host).attach() as guest:
        return len(large_mappings(guest)) // LARGE


@pytest.mark.parametrize(("vm", "method"), [("hugetlb", "pre-copy"), ("thp", "enlightened")], indirect=["vm"])
def test_as_many_large_mappings_after_as_before(vm: Vm, method: str) -> None:
    before = large(vm, "a")
    assert before > _MIB // 4
    done = vm.cluster.a.outboard("migrate", vm.name, "b", "-o", "ndjson", f"--{method}", "--max-downtime", "2s")
    assert done.returncode == 0, done.stderr + vm.cluster.a.log()[-2000:] + vm.cluster.b.log()[-2000:]
    summary = summary_of(done.stdout)
    vm.verify("b")
    assert summary["large_mappings_before"] == before
    assert summary["large_mappings_after"] == large(vm, "b") >= 0.99 * before


def test_every_page_is_the_same_and_back_again(vm: Vm) -> None:
    for source, target, method in (("a", "b", "post-copy"), ("b", "a", "hybrid")):
        options = ("-o", "ndjson", "--verify", f"--{method}")
        done = vm.cluster.hosts[source].outboard("migrate", vm.name, target, *options)
        assert done.returncode == 0, done.stderr
        assert summary_of(done.stdout)["verified"] is True
        vm.verify(target)


@pytest.mark.parametrize("vm", ["thp"], indirect=True)
def test_a_cancelled_migration_leaves_the_large_mappings(vm: Vm) -> None:
    before = large(vm, "a")
    process = vm.cluster.a.popen("migrate", vm.name, "b", "-o", "ndjson", "--pre-copy", "--max-bandwidth", "10MB")
    assert process.stdout is not None
    for line in process.stdout:
        if '"state":"copying"' in line:
            vm.cluster.a.outboard("cancel", vm.name)
            break
    process.communicate()
    assert process.returncode == 5
    wait_for(lambda: not vm.cluster.b.has(vm.name), "the end of the destination's QEMU")
    vm.verify("a")
    assert large(vm, "a") >= 0.99 * before
