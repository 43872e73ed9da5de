"""The kernel merges what it is told it may, of processes that never said so themselves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from outboard.errors import KernelError, RefusedError
from outboard.linux import ksm
from outboard.sharing.ksm import Merging
from tests.support.machine import ksmd
from tests.support.process_guest import guest_of
from tests.support.requirements import require
from tests.support.target import Target


@pytest.fixture
def merging() -> Iterator[None]:
    require("root", "ksm")
    with ksmd():
        yield


@pytest.mark.usefixtures("merging")
def test_equal_anonymous_pages_are_merged_and_parted() -> None:
    with contextlib.ExitStack() as until_end:
        targets = [until_end.enter_context(Target("anon", mebibytes=4)) for _ in range(2)]
        guests = [until_end.enter_context(guest_of(target)) for target in targets]
        with contextlib.ExitStack() as merged:
            ways = [merged.enter_context(Merging(guest)) for guest in guests]
            deadline = time.monotonic() + 60
            while sum(way.statistics().merged for way in ways) < 2 * 1000:
                assert time.monotonic() < deadline, [way.statistics() for way in ways]
                time.sleep(0.01)
            assert sum(way.statistics().profit for way in ways) > 0
            assert targets[0].ask("w 7 70") == "written"
            assert targets[1].ask("r 7") == "7"
        # ksmd forgets what it knew of them when it comes round again.
        while sum(way.statistics().merged for way in ways):
            assert time.monotonic() < deadline, [way.statistics() for way in ways]
            time.sleep(0.01)
        assert targets[0].ask("r 7") == "70"


def test_memory_in_a_file_is_refused() -> None:
    require("root", "ksm")
    with Target() as target, guest_of(target) as guest, pytest.raises(RefusedError, match="anonymous memory only"):
        Merging(guest)


def test_a_setting_that_is_none_is_said_to_be() -> None:
    require("ksm")
    with pytest.raises(KernelError, match="no_such"):
        ksm.setting("no_such")
    with pytest.raises(KernelError, match="ksm_stat"):
        ksm.statistics(2**22 + 1)
