"""Another process's processor time, which goes on while it works and ends with it."""

from __future__ import annotations

import errno
import time

import pytest

from outboard.errors import KernelError
from outboard.linux import cpuclock
from tests.support.target import Target


def test_it_goes_on_while_the_process_works() -> None:
    with Target(threads=1) as target:
        clock = cpuclock.of(target.pid)
        asleep = cpuclock.read(clock)
        assert cpuclock.read(clock) - asleep < 1_000_000
        target.ask("g")
        while cpuclock.read(clock) - asleep < 5_000_000:
            time.sleep(0.001)
        target.ask("s")
    with pytest.raises(KernelError, match=str(target.pid)) as caught:
        cpuclock.read(clock)
    assert caught.value.errno == errno.ESRCH
