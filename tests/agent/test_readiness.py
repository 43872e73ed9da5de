"""What this host lacks for a VM, each with its word."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from outboard.agent import readiness
from outboard.linux import proc
from outboard.vmm.registry import Registry, VmRecord


def words(root: Path, spec: str, qemu: tuple[int, int] | None = None) -> dict[str, str]:
    found = readiness.blockers(spec, qemu, Registry(root), here="b")
    assert all(one.at == "b" for one in found)
    return {one.reason: one.words for one in found}


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """A program that says it is QEMU 7.2."""
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian)'\n")
    path.chmod(0o755)
    return path


def test_nothing_in_the_way(tmp_path: Path, qemu: Path) -> None:
    spec = f'name = "web"\nmemory = "1MiB"\nqemu = "{qemu}"\n[boot]\nkernel = "{qemu}"\n'
    assert words(tmp_path, spec, (7, 2)) == {}
    assert words(tmp_path, spec, None) == {}


def test_each_thing_that_is_missing_is_named(tmp_path: Path, qemu: Path) -> None:
    spec = (
        f'name = "web"\nmemory = "512TiB"\nqemu = "{qemu}"\n[boot]\nkernel = "/none/vmlinuz"\n'
        '[[disks]]\npath = "/none/disk"\n[[networks]]\ntap = "lo"\nbridge = "no-such-br"\n'
    )
    found = words(tmp_path, spec, (8, 1))
    assert set(found) == {"no-memory", "qemu-version", "missing-file", "network"}
    assert "7.2 here" in found["qemu-version"]
    assert "8.1" in found["qemu-version"]
    assert "MiB are memory available" in found["no-memory"]
    assert words(tmp_path, 'name = "web"\nmemory = "1MiB"\nqemu = "/none/qemu"\n').keys() == {"no-qemu"}
    assert words(tmp_path, 'name = "web"\nmemory = "1MiB"\npage_size = "2MiB"\n').keys() >= {"spec"}


def test_huge_pages_are_counted_in_their_pool(tmp_path: Path, qemu: Path) -> None:
    spec = f'name = "web"\nmemory = "512TiB"\npage_size = "2MiB"\nqemu = "{qemu}"\n'
    assert "huge pages of 2MiB" in words(tmp_path, spec)["no-memory"]


def test_a_name_that_is_taken(tmp_path: Path, qemu: Path) -> None:
    directory = tmp_path / "vms" / "web"
    directory.mkdir(parents=True)
    record = VmRecord(
        name="web",
        pid=os.getpid(),
        start_time=proc.start_time(os.getpid()),
        directory=directory,
        accelerator="tcg",
        accelerator_reason="",
        memory_bytes=1 << 20,
        vcpus=1,
        guest_agent=False,
        started=0.0,
    )
    Registry(tmp_path).add(record, "")
    assert "outboard stop web" in words(tmp_path, f'name = "web"\nmemory = "1MiB"\nqemu = "{qemu}"\n')["name-taken"]


def test_a_program_that_says_no_version(tmp_path: Path) -> None:
    assert readiness.version_of(sys.executable) is None
    assert readiness.version_of(str(tmp_path / "none")) is None
