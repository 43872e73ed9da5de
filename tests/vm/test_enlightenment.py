"""What a real guest tells of its pages, against what it says in /proc/meminfo."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from outboard.vmm import kpageflags
from outboard.vmm.attach import attach
from outboard.vmm.enlighten import PageClass, chunks
from outboard.vmm.guest import QemuGuest
from outboard.vmm.guest_agent import GuestAgent
from tests.support.machine import Machine
from tests.support.requirements import require

pytestmark = pytest.mark.slow

# 3 GiB: part of the memory lies above 4 GiB.
MEBIBYTES = 3072


@pytest.fixture(scope="module")
def guest() -> Iterator[QemuGuest]:
    require("qemu", "root")
    with Machine(MEBIBYTES, boot=True) as vm, attach(qmp=vm.qmp) as attached:
        yield attached


@pytest.fixture
def agent(guest: QemuGuest) -> Iterator[GuestAgent]:
    assert guest.agent_path is not None
    with GuestAgent(guest.agent_path, 60) as connected:
        yield connected


def meminfo(agent: GuestAgent) -> dict[str, int]:
    """Counts of pages."""
    status, text = agent.run("/bin/cat", "/proc/meminfo")
    assert status == 0
    fields = [line.split() for line in text.decode().splitlines()]
    return {field[0].rstrip(":"): int(field[1]) // 4 for field in fields if field[-1] == "kB"}


def classes_of(guest: QemuGuest, agent: GuestAgent) -> NDArray[np.uint8]:
    classes = np.full(guest.pages, PageClass.OTHER, dtype=np.uint8)
    for first, part in chunks(guest, agent, deadline=time.monotonic() + 60):
        classes[first : first + part.size] = part
    return classes


def test_classes_are_what_the_guest_counts(guest: QemuGuest, agent: GuestAgent) -> None:
    # The first round brings programs and their libraries into memory, and to the shape of free lists that lasts.
    classes_of(guest, agent)
    before = meminfo(agent)
    counts = np.bincount(classes_of(guest, agent), minlength=len(PageClass))
    after = meminfo(agent)

    def close(kind: PageClass, field: str, slack: int) -> bool:
        return bool(
            min(before[field], after[field]) - slack <= counts[kind] <= max(before[field], after[field]) + slack
        )

    # The programs that look use memory while they do: a shell, dd and gzip.
    assert close(PageClass.FREE, "MemFree", 600)
    assert close(PageClass.PAGE_TABLES, "PageTables", 40)
    assert close(PageClass.SLAB, "Slab", 600)
    lists = counts[[PageClass.ACTIVE_ANON, PageClass.ACTIVE_FILE, PageClass.INACTIVE]].sum()
    assert abs(lists - before["Active"] - before["Inactive"] - before["Unevictable"]) < 600
    assert counts.sum() == guest.pages


def test_both_ways_of_asking_tell_the_same(agent: GuestAgent) -> None:
    deadline = time.monotonic() + 60
    end = 512 * 256 * 8
    by_file = b"".join(data for _, data in kpageflags._by_file(agent, 0, end, deadline))
    by_program = b"".join(data for _, data in kpageflags._by_program(agent, 0, end, deadline))
    assert len(by_file) == len(by_program) == end
    same = np.frombuffer(by_file, dtype="<u8") == np.frombuffer(by_program, dtype="<u8")
    assert np.mean(same) > 0.99


def test_free_pages_are_not_the_kernels_nor_the_firmwares(guest: QemuGuest, agent: GuestAgent) -> None:
    classes = classes_of(guest, agent)
    # Page 0, the legacy hole and what the guest does not list at the end of its memory.
    assert not np.any(classes[[0, *range(0xA0, 0x100), *range(guest.pages - 32, guest.pages)]] == PageClass.FREE)
    # Most of a fresh guest's memory is free, below the hole and above.
    for region in guest.regions:
        assert np.mean(classes[region.first : region.first + region.pages] == PageClass.FREE) > 0.5


def test_the_content_of_a_free_page_does_not_matter(guest: QemuGuest, agent: GuestAgent) -> None:
    """The claim that skipping stands on: garbage in what the guest holds free, and it runs on unharmed."""
    free = classes_of(guest, agent) == PageClass.FREE
    guest.monitor.execute("stop")
    # Memory that has never been written is free still, whatever the guest did after it was asked.
    untouched = np.flatnonzero(free & ~guest.memory.populated().mask())
    rng = np.random.default_rng(5)
    chosen = rng.choice(untouched, 2000, replace=False)
    garbage = memoryview(rng.bytes(4096))
    for page in chosen:
        guest.memory.write(int(page), garbage)
    guest.monitor.execute("cont")
    # The guest takes a good part of its memory into use, and it is as empty as fresh memory has to be.
    fill = "dd if=/dev/zero of=/tmp/fill bs=1M count=128 2>/dev/null; tr -d '\\0' </tmp/fill | wc -c; rm /tmp/fill"
    assert agent.run("/bin/sh", "-c", fill) == (0, b"0\n")
