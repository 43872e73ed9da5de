"""What a process says about itself."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import pidfd, prctl


def test_a_name_is_cut_to_what_fits() -> None:
    before = Path("/proc/thread-self/comm").read_text().rstrip()
    prctl.set_name("outboard-with-a-long-name")
    assert Path("/proc/thread-self/comm").read_text() == "outboard-with-a\n"
    prctl.set_name(before)


def test_a_child_ends_with_its_parent() -> None:
    ready, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            prctl.set_parent_death_signal(signal.SIGKILL)
            os.write(told, os.getpid().to_bytes(4, "little"))
        select.select([], [], [])
    grandchild = pidfd.open(int.from_bytes(os.read(ready, 4), "little"))
    assert not pidfd.wait(grandchild, 0)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert pidfd.wait(grandchild, 5)
    for fd in (grandchild, ready, told):
        os.close(fd)


def test_a_signal_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KernelError, match="PR_SET_PDEATHSIG"):
        prctl.set_parent_death_signal(99)  # type: ignore[arg-type]  # the kernel's own check is what is wanted
