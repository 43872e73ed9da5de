"""The scheduling group on the live kernel."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest

from demo.scheduling import SchedulingGroup, _hierarchy, remove
from tests.support.requirements import require


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root")
    if _hierarchy() is None:
        pytest.skip("cpu-controller: no cpu controller is mounted; autogroups are then left as they are")


def groups() -> str:
    return Path("/proc/self/cgroup").read_text()


def test_children_are_born_inside_and_everything_is_as_before() -> None:
    before = groups()
    name = f"outboard-demo-test-{secrets.token_hex(4)}"
    group = SchedulingGroup(name)
    group.enter()
    try:
        inside = subprocess.run(["cat", "/proc/self/cgroup"], capture_output=True, text=True, check=True).stdout
        assert f"/{name}\n" in inside
    finally:
        group.close()
    group.close()
    assert groups() == before


def test_a_group_that_was_left_is_removed_by_its_name() -> None:
    before = groups()
    name = f"outboard-demo-test-{secrets.token_hex(4)}"
    SchedulingGroup(name).enter()
    remove(name)
    remove(name)
    assert groups() == before


def test_a_machine_that_has_no_real_time_left_to_give() -> None:
    name = f"outboard-demo-test-{secrets.token_hex(4)}"
    groups = [SchedulingGroup(f"{name}-{number}") for number in range(4)]
    try:
        for group in groups:
            group.enter()
    finally:
        for group in reversed(groups):
            group.close()
