"""What this host promises its VMs, and whom it does not start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outboard.agent.promises import admitted, promise_of, promises
from outboard.agent.readiness import blockers
from outboard.errors import RefusedError
from outboard.linux import proc
from outboard.reclaim.pools import Promise
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import VmSpec

MIB = 1 << 20


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("OUTBOARD_CONFIG_DIR", str(tmp_path))
    (tmp_path / "agent.toml").write_text(
        'name = "a"\nlisten = "::1"\n[swap]\nreservation = "1GiB"\n[pools.prod]\nlimit = "512MiB"\n'
    )
    return Registry(tmp_path / "run")


def start(registry: Registry, spec: VmSpec) -> None:
    """As far as the registry is concerned: this process is its QEMU."""
    with registry.reserve(spec.name) as directory:
        registry.add(
            VmRecord(
                name=spec.name,
                pid=os.getpid(),
                start_time=proc.start_time(os.getpid()),
                directory=directory,
                accelerator="tcg",
                accelerator_reason="",
                memory_bytes=spec.memory_bytes,
                vcpus=1,
                guest_agent=False,
                started=0.0,
            ),
            spec.to_toml(),
        )


def test_what_a_vm_is_promised() -> None:
    assert promise_of(VmSpec(name="a", memory="256MiB")) == Promise("", 256 * MIB)
    assert promise_of(VmSpec(name="a", memory="256MiB", memory_reservation="100MiB", pool="x")).size == 156 * MIB
    assert promise_of(VmSpec(name="a", memory="256MiB", memory_reservation="256MiB")).size == 0
    # Whole units are taken, and large pages never.
    assert promise_of(VmSpec(name="a", memory="256MiB", memory_reservation="4KiB")).size == 256 * MIB
    assert promise_of(VmSpec(name="a", memory="256MiB", page_size="2MiB")).size == 0


def test_who_could_outgrow_it_is_not_started(registry: Registry) -> None:
    one = VmSpec(name="one", memory="512MiB", pool="prod")
    with admitted(one, registry):
        start(registry, one)
    assert promises(registry) == {"one": Promise("prod", 512 * MIB)}
    with (
        pytest.raises(RefusedError, match=r"pool prod \(limit\) is 512 MiB, of which 512 MiB are spoken for") as caught,
        admitted(VmSpec(name="two", memory="1MiB", pool="prod"), registry),
    ):
        raise AssertionError("it was let in")
    assert caught.value.exit_code == 4
    with admitted(VmSpec(name="two", memory="512MiB"), registry):
        pass
    found = blockers(VmSpec(name="three", memory="513MiB").to_toml(), None, registry, here="a")
    assert (
        "the swap reservation is 1024 MiB, of which 512 MiB are spoken for"
        in {one.reason: one.words for one in found}["swap-reservation"]
    )


def test_where_nothing_is_reserved_nothing_is_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('name = "a"\nlisten = "::1"\n')
    with admitted(VmSpec(name="big", memory="1TiB", pool="nowhere"), registry):
        pass
    (tmp_path / "agent.toml").unlink()
    with admitted(VmSpec(name="big", memory="1TiB"), registry):
        pass
