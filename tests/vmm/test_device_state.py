"""Whether a guest can be moved at all, by what its QEMU says of it."""

from __future__ import annotations

import pytest

from outboard.errors import RefusedError
from outboard.vmm.device_state import runs, take_back
from outboard.vmm.monitor import Monitor
from tests.support.machine import Machine
from tests.support.requirements import require


def test_a_guest_that_neither_runs_nor_is_paused_is_refused() -> None:
    require("qemu")
    with Machine() as machine, Monitor.connect(machine.qmp) as monitor:
        with pytest.raises(RefusedError, match="web neither runs nor is paused: its QEMU says prelaunch") as refused:
            runs(monitor, "web")
        assert refused.value.reason == "run-state"


def test_one_that_runs_and_one_that_somebody_paused() -> None:
    require("qemu")
    with Machine() as machine, Monitor.connect(machine.qmp) as monitor:
        monitor.execute("cont")
        assert runs(monitor, "web")
        monitor.execute("stop")
        assert not runs(monitor, "web")


def test_what_no_migration_has_stopped_is_left_as_it_is() -> None:
    require("qemu")
    with Machine() as machine, Monitor.connect(machine.qmp) as monitor:
        monitor.execute("cont")
        monitor.execute("stop")
        take_back(monitor)
        assert not runs(monitor, "web")
