"""The pages that devices are about to touch: which are due, and which were written behind the back of whoever sent
them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from outboard.migrate import ranking
from outboard.migrate.devices import Devices
from outboard.migrate.findings import Findings
from outboard.migrate.outbox import Outbox
from outboard.pages import PAGE_SIZE
from outboard.vmm.guest import Guest, QemuGuest
from outboard.vmm.virtqueues import DevicePages, Queue, Queues
from tests.support.process_guest import guest_of
from tests.support.target import Target
from tests.vmm.test_virtqueues import descriptor, write

QUEUE = Queue(4, 0x1000, 0x2FFC, 0x4000)
"""Its rings are pages 1 to 4."""


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Target(mebibytes=1) as target, guest_of(target) as made:
        made.memory.write(0, memoryview(bytes(8 * PAGE_SIZE)))
        write(made, 0x1000, descriptor(0x10FFF, 2))
        write(made, 0x2FFE, b"\x01\x00")
        yield made


@pytest.fixture
def outbox(guest: Guest) -> Outbox:
    return Outbox(guest.pages)


@pytest.fixture
def findings() -> Findings:
    return Findings()


@pytest.fixture
def devices(guest: Guest, outbox: Outbox, findings: Findings) -> Devices:
    made = Devices(cast(QemuGuest, guest), outbox, findings)
    made._told = DevicePages(guest, Queues((QUEUE,), "1 queues of 1 devices"))
    return made


def test_what_is_not_sent_is_due_and_ranked_also_what_had_no_turn(
    devices: Devices, outbox: Outbox, findings: Findings
) -> None:
    outbox.sent[2] = 1
    assert devices.due().numbers().tolist() == [1, 3, 4, 0x10, 0x11, 0xC0, 0xC1, 0xC2]
    assert outbox.rank[[1, 4, 0x10, 0x11]].tolist() == [ranking.QUEUES] * 2 + [ranking.IN_FLIGHT] * 2
    assert findings.queue_pages == 9
    assert devices.hit([2, 0x11, 0x12, -1, 1 << 40]) == 2


def test_nobody_asked_nothing_due(guest: Guest, outbox: Outbox, findings: Findings) -> None:
    devices = Devices(cast(QemuGuest, guest), outbox, findings)
    assert not devices.due()
    assert not devices.changed()
    assert findings.queue_pages is None


def test_what_was_written_after_it_went_is_told_by_its_digest(guest: Guest, devices: Devices) -> None:
    due = devices.due()
    devices.watch(due)
    assert not devices.changed()
    write(guest, 0x4002, b"\x01")
    write(guest, 0x5000, b"\x01")
    assert devices.changed().numbers().tolist() == [4]
