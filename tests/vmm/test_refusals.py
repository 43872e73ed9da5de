"""Refusals of what cannot be started on a test machine, decided on answers recorded elsewhere."""

from __future__ import annotations

import pytest

from outboard.errors import RefusedError
from outboard.vmm.refusals import refuse_confidential, refuse_own_faults, refuse_pinned, refuse_shared_with_others

PLAIN_LINKS = ["/dev/null", "socket:[81]", "anon_inode:[eventfd]", "anon_inode:kvm-vm", "/memfd:ram (deleted)"]
PLAIN_TYPES = ["string", "child<virtio-net-pci>", "child<virtserialport>", "child<memory-backend-memfd>"]
USER_NETWORK = (
    "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
    " \\ vhost-user: index=0,type=user,net=10.0.2.0,restrict=off\n"
)
TAP_NETWORK = " \\ n: index=0,type=tap,ifname=tap0,script=no,downscript=no,vhost=on\n"


def test_an_ordinary_vm_passes() -> None:
    refuse_confidential("vm", "")
    refuse_pinned("vm", PLAIN_LINKS, PLAIN_TYPES)
    for network in (USER_NETWORK, TAP_NETWORK, ""):
        refuse_shared_with_others("vm", network, PLAIN_TYPES)
    refuse_own_faults("vm", [{"capability": "postcopy-ram", "state": False}, {"capability": "multifd", "state": True}])


@pytest.mark.parametrize("guard", ["/objects/sev0", "/objects/tdx0", "/objects/pv0"])
def test_an_encrypted_vm(guard: str) -> None:
    with pytest.raises(RefusedError, match=guard) as caught:
        refuse_confidential("vm", guard)
    assert caught.value.reason == "confidential"


@pytest.mark.parametrize(
    ("links", "types"),
    [
        (["/dev/vfio/12"], []),
        (["/dev/vfio/vfio"], []),
        (["/dev/vfio/devices/vfio0"], []),
        (["/dev/iommu"], []),
        (["anon_inode:kvm-vfio"], []),
        ([], ["child<vfio-pci>"]),
        ([], ["child<vfio-pci-nohotplug>"]),
    ],
)
def test_a_passed_through_device(links: list[str], types: list[str]) -> None:
    with pytest.raises(RefusedError, match="unplug it") as caught:
        refuse_pinned("vm", PLAIN_LINKS + links, PLAIN_TYPES + types)
    assert caught.value.reason == "vfio"


@pytest.mark.parametrize(
    ("network", "types"),
    [
        (" \\ n: index=0,type=vhost-user,vhost-user to c\n", []),
        (" \\ n: index=0,type=vhost-vdpa,vhostdev=/dev/vhost-vdpa-0\n", []),
        ("", ["child<vhost-user-fs-pci>"]),
        ("", ["child<vhost-user-blk-pci-non-transitional>"]),
        ("", ["child<vhost-vdpa-device-pci>"]),
        ("", ["child<cryptodev-vhost-user>"]),
    ],
)
def test_a_device_of_another_process(network: str, types: list[str]) -> None:
    with pytest.raises(RefusedError, match="another process maps its memory") as caught:
        refuse_shared_with_others("vm", network, PLAIN_TYPES + types)
    assert caught.value.reason == "vhost-user"


def test_memory_of_several_vms() -> None:
    with pytest.raises(RefusedError) as caught:
        refuse_shared_with_others("vm", "", ["child<ivshmem-doorbell>"])
    assert caught.value.reason == "ivshmem"


@pytest.mark.parametrize("capability", ["postcopy-ram", "background-snapshot"])
def test_qemus_own_faults(capability: str) -> None:
    with pytest.raises(RefusedError, match=capability) as caught:
        refuse_own_faults("vm", [{"capability": capability, "state": True}])
    assert caught.value.reason == "uffd-taken"
