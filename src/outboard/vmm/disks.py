"""A VM's disks held still at an instant: what was written so far stays as it is, and what follows goes to an overlay.

Source: qapi/transaction.json, qapi/block-core.json (blockdev-snapshot-sync), qemu-img(1).
"""

from __future__ import annotations

import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from outboard.errors import OutboardError, RefusedError
from outboard.vmm.monitor import Monitor
from outboard.vmm.spec import Disk, VmSpec

_OVERLAY = re.compile(r"\.[0-9a-f]{8}\.qcow2$")


def _tops(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """Of each of the spec's disks, by ``diskN``, the image that QEMU now writes to."""
    found = {}
    for device in monitor.execute("query-block"):
        inserted = device.get("inserted")
        if inserted is None:
            continue
        name = re.match(r"disk\d+", inserted["node-name"])
        if name is not None:
            found[name[0]] = inserted
    return found


def _overlay_of(path: str) -> str:
    """Where an overlay of an image goes: beside it, so that whoever reaches the one reaches the other."""
    return f"{_OVERLAY.sub('', path)}.{secrets.token_hex(4)}.qcow2"


def freeze(monitor: Monitor, spec: VmSpec) -> bool:
    """Give each disk that the VM writes to an overlay, all in one step; whether there are any.

    Between stopping the VM and letting it go on. QEMU has finished what it was asked to write.

    :raise OutboardError: QEMU could not; no disk has changed.
    """
    actions: list[dict[str, Any]] = []
    if all(disk.read_only for disk in spec.disks):
        return False
    tops = _tops(monitor)
    for index, disk in enumerate(spec.disks):
        if disk.read_only:
            continue
        top = tops.get(f"disk{index}")
        if top is None:
            raise RefusedError(
                "disk-changed", f"{spec.name}: QEMU has no node for {disk.path}; somebody has changed its disks by hand"
            )
        overlay = _overlay_of(top["file"])
        data = {
            "node-name": top["node-name"],
            "snapshot-file": overlay,
            "snapshot-node-name": f"disk{index}-{secrets.token_hex(4)}",
            "format": "qcow2",
        }
        actions.append({"type": "blockdev-snapshot-sync", "data": data})
    monitor.execute("transaction", actions=actions)
    return True


def described(monitor: Monitor, spec: VmSpec) -> VmSpec:
    """The description of the VM with the images that QEMU writes to now."""
    tops = _tops(monitor)
    disks = []
    for index, disk in enumerate(spec.disks):
        top = tops.get(f"disk{index}")
        if top is not None and top["file"] != disk.path and top["drv"] == "qcow2":
            disk = msgspec.structs.replace(disk, path=top["file"], format="qcow2")
        disks.append(disk)
    return msgspec.structs.replace(spec, disks=disks)


def cloned(spec: VmSpec) -> VmSpec:
    """The description of a VM of its own that begins with the disks of another that holds still: overlays of them.

    :raise OutboardError: an overlay cannot be made.
    """
    disks: list[Disk] = []
    made: list[Path] = []
    for disk in spec.disks:
        if disk.read_only:
            disks.append(disk)
            continue
        overlay = Path(_overlay_of(disk.path))
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk.path, "-F", disk.format, str(overlay)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            failed, said = done.returncode != 0, done.stderr.strip()
        except FileNotFoundError:
            failed, said = True, "there is no program qemu-img; install qemu-utils"
        if failed:
            for path in (*made, overlay):
                path.unlink(missing_ok=True)
            raise OutboardError(f"overlay of {disk.path} for {spec.name}: {said}")
        made.append(overlay)
        disks.append(msgspec.structs.replace(disk, path=str(overlay), format="qcow2"))
    return msgspec.structs.replace(spec, disks=disks)


def remove_clones(spec: VmSpec) -> None:
    """Remove the overlays of a VM that was never let run. Idempotent."""
    for disk in spec.disks:
        if not disk.read_only and _OVERLAY.search(disk.path):
            Path(disk.path).unlink(missing_ok=True)
