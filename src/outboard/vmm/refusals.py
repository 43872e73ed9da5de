"""Whom we do not manage, and why: decisions on what QEMU and the kernel answered.

Memory that somebody else writes past the page tables cannot be traced, evicted or moved; memory that the host cannot
read neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from outboard.errors import RefusedError

_FOREIGN_NETWORK = re.compile(r"\btype=(vhost-user|vhost-vdpa)\b")
_OWN_FAULTS = ("postcopy-ram", "background-snapshot")


def refuse_confidential(name: str, guard: object) -> None:
    """Refuse a VM whose memory is encrypted.

    :param guard: the machine's property ``confidential-guest-support``; empty when there is none.
    :raise RefusedError: ``confidential``.
    """
    if guard:
        raise RefusedError(
            "confidential",
            f"{name} is a confidential VM ({guard}): the host can neither read nor move its encrypted memory",
        )


def refuse_pinned(name: str, links: Iterable[str], device_types: Iterable[str]) -> None:
    """Refuse a VM with a passed-through device.

    :param links: what QEMU's descriptors refer to.
    :param device_types: of all its devices.
    :raise RefusedError: ``vfio``.
    """
    pinned = [link for link in links if link.startswith(("/dev/vfio/", "/dev/iommu")) or "kvm-vfio" in link]
    pinned += [kind for kind in device_types if "vfio-" in kind]
    if pinned:
        raise RefusedError(
            "vfio",
            f"{name} has a passed-through device ({pinned[0]}): it writes to pinned memory, past any page fault; "
            "unplug it first",
        )


def refuse_shared_with_others(name: str, network: str, device_types: Iterable[str]) -> None:
    """Refuse a VM whose memory another process maps.

    :param network: the text of ``info network``.
    :param device_types: of all its devices and objects.
    :raise RefusedError: ``vhost-user`` or ``ivshmem``.
    """
    served = [match[1] for match in _FOREIGN_NETWORK.finditer(network)]
    served += [kind for kind in device_types if "vhost-user" in kind or "vhost-vdpa" in kind]
    if served:
        raise RefusedError(
            "vhost-user",
            f"{name} has a {served[0]} device: another process maps its memory, and what that one writes cannot be "
            "traced; use a device that QEMU serves itself",
        )
    windows = [kind for kind in device_types if "ivshmem" in kind]
    if windows:
        raise RefusedError(
            "ivshmem", f"{name} has an {windows[0]} device: that memory belongs to other VMs too; unplug it first"
        )


def refuse_own_faults(name: str, capabilities: Iterable[dict[str, Any]]) -> None:
    """Refuse a VM for which QEMU itself is about to serve page faults.

    :param capabilities: the answer of ``query-migrate-capabilities``.
    :raise RefusedError: ``uffd-taken``.
    """
    on = [one["capability"] for one in capabilities if one["state"] and one["capability"] in _OWN_FAULTS]
    if on:
        raise RefusedError(
            "uffd-taken",
            f"{name}: QEMU's own {on[0]} is switched on, and its userfaultfd excludes ours; switch it off with "
            "migrate-set-capabilities",
        )
