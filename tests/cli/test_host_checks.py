"""The machine's checks: on this machine as it is, and on ones that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest

from outboard.cli import host_checks
from outboard.cli.findings import Finding, Verdict
from outboard.errors import KernelError
from outboard.linux import pagemap, ptrace
from outboard.linux.userfaultfd import Features
from outboard.stores.images.files import ImageFile
from tests.support.requirements import require

SHMEM = Features.MISSING_SHMEM | Features.MINOR_SHMEM


def kernel(
    monkeypatch: pytest.MonkeyPatch, features: Features, *, scan: bool = False, soft: bool = False
) -> list[Finding]:
    monkeypatch.setattr(host_checks, "available_features", lambda: features)
    monkeypatch.setattr(pagemap, "has_pagemap_scan", lambda: scan)
    monkeypatch.setattr(pagemap, "has_soft_dirty", lambda: soft)
    return list(host_checks.userfaultfd())


def test_injection_is_tried_and_works_for_root() -> None:
    require("root")
    (found,) = host_checks.injection()
    assert found.verdict is Verdict.OK


def test_injection_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int) -> None:
        raise KernelError("PTRACE_SEIZE of 1", 1)

    monkeypatch.setattr(ptrace, "inject_userfaultfd", refuse)
    (found,) = host_checks.injection()
    assert found.verdict is Verdict.REFUSED
    assert "PTRACE_SEIZE" in found.found
    assert "ptrace_scope" in found.mend


@pytest.mark.parametrize(
    ("features", "scan", "soft", "expected"),
    [
        (Features.WP_ASYNC | Features.WP_UNPOPULATED, True, False, Verdict.OK),
        (Features.WP_ASYNC | Features.WP_UNPOPULATED | Features.WP_HUGETLBFS_SHMEM, False, False, Verdict.NOTE),
        (Features.WP_HUGETLBFS_SHMEM, False, False, Verdict.NOTE),
        (Features(0), False, True, Verdict.NOTE),
        (Features(0), False, False, Verdict.REFUSED),
    ],
)
def test_write_trace_follows_what_the_kernel_has(
    monkeypatch: pytest.MonkeyPatch, features: Features, scan: bool, soft: bool, expected: Verdict
) -> None:
    served, trace = kernel(monkeypatch, SHMEM | features, scan=scan, soft=soft)
    assert served.verdict is Verdict.OK
    assert trace.verdict is expected


def test_kernel_without_minor_faults_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    served, _ = kernel(monkeypatch, Features.MISSING_SHMEM, soft=True)
    assert served.verdict is Verdict.REFUSED
    assert served.found == "without MINOR_SHMEM"


def test_kernel_without_userfaultfd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Features:
        raise KernelError("userfaultfd", 38)

    monkeypatch.setattr(host_checks, "available_features", refuse)
    (found,) = host_checks.userfaultfd()
    assert found.verdict is Verdict.REFUSED


def test_qemu_here_can_move_device_state_alone() -> None:
    require("qemu")
    (found,) = host_checks.qemu()
    assert found.verdict is Verdict.OK
    assert found.found.count(".") == 2


def fake_qemu(monkeypatch: pytest.MonkeyPatch, directory: Path, body: str) -> Finding:
    program = directory / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    (found,) = host_checks.qemu()
    return found


def test_qemu_without_a_capability_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [
        '{"return": {}}',
        '{"return": {"qemu": {"major": 4, "minor": 1, "micro": 0}}}',
        '{"return": [{"capability": "x-ignore-shared", "state": false}]}',
        '{"return": {}}',
    ]
    found = fake_qemu(monkeypatch, tmp_path, "\n".join(f"echo '{answer}'" for answer in answers))
    assert found.verdict is Verdict.REFUSED
    assert found.found == "4.1.0 without pause-before-switchover"


@pytest.mark.parametrize("body", ["exit 1", "echo nonsense", "true"])
def test_qemu_that_answers_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    assert fake_qemu(monkeypatch, tmp_path, body).verdict is Verdict.REFUSED


def test_kvm_that_cannot_be_used_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu")
    monkeypatch.setattr(host_checks, "why_not_kvm", lambda _qemu, _cpu, _memory: "there is no /dev/kvm")
    (found,) = host_checks.kvm()
    assert found.verdict is Verdict.NOTE
    assert found.found == "there is no /dev/kvm"


def test_leases_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = host_checks.leases()
    assert found.verdict is Verdict.OK
    monkeypatch.setattr(ImageFile, "lease", lambda _: False)
    (found,) = host_checks.leases()
    assert (found.verdict, found.mend) == (Verdict.NOTE, "sysctl fs.leases-enable=1")


def test_the_other_checks_never_refuse_here() -> None:
    require("root")
    for check in (host_checks.privileges, host_checks.memory, host_checks.network, host_checks.cpu_limits):
        assert all(found.verdict is not Verdict.REFUSED for found in check())
