"""QEMU's command line for a VM whose memory can be managed from outside.

RAM is one file that is mapped shared, which is what lets another process read it, fill it and trace it. Beside it there
are as few devices as possible: loading their state at the destination is most of a migration's blackout. Hence no VGA,
no option ROMs, no SATA, no SMBus, and no description of the state in its own stream; each of them would be saved, sent
and loaded with every move.
"""

from __future__ import annotations

import json

from outboard.vmm.registry import AGENT_SOCKET, CONSOLE, ENGINE_SOCKET, QMP_SOCKET
from outboard.vmm.spec import MIB, VmSpec

_SPARE_DEVICES = "sata=off,smbus=off"


def _monitor(name: str, socket: str) -> list[str]:
    return [
        "-chardev",
        f"socket,id={name},path={socket},server=on,wait=off",
        "-mon",
        f"chardev={name},mode=control",
    ]


def qemu_arguments(spec: VmSpec, *, memory_fd: int, tap_fds: list[int], incoming: bool) -> list[str]:
    """The arguments, the program included. Sockets and logs are named relative to the VM's directory.

    :param spec: a settled one.
    :param memory_fd: the file of the RAM, ``spec.memory_bytes`` long.
    :param tap_fds: for each network a TAP.
    :param incoming: wait for a migration instead of starting the guest.
    """
    machine = f"{spec.machine},accel={spec.accel},memory-backend=ram,usb=off,vmport=off"
    machine += ",dump-guest-core=off,suppress-vmdesc=on"
    if spec.machine.startswith(("q35", "pc-q35")):
        machine += f",{_SPARE_DEVICES}"
    # Opened by path, even if the path is a descriptor's: QEMU 8.1 and later leave only such memory out of a migration.
    memory = f"memory-backend-file,id=ram,share=on,size={spec.memory_bytes},mem-path=/proc/self/fd/{memory_fd}"
    # Where the host gives large pages to shared memory that asks for them, as QEMU does, it can: only what is aligned.
    memory += f",align={2 * MIB}"
    arguments = [spec.qemu, "-name", f"{spec.name},debug-threads=on", "-machine", machine, "-cpu", spec.cpu]
    arguments += ["-smp", str(spec.vcpus), "-m", f"{spec.memory_bytes // MIB}M", "-object", memory]
    arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"]
    arguments += _monitor("engine", ENGINE_SOCKET) + _monitor("qmp", QMP_SOCKET)
    arguments += ["-serial", f"file:{CONSOLE}"]
    if spec.guest_agent:
        # Port 0 is the console. A port is two queues, and what a device has is loaded while the guest stands still.
        arguments += ["-device", "virtio-serial-pci,id=serial,max_ports=2", "-chardev"]
        arguments += [f"socket,id=agent,path={AGENT_SOCKET},server=on,wait=off", "-device"]
        arguments += ["virtserialport,bus=serial.0,chardev=agent,name=org.qemu.guest_agent.0"]
    if spec.boot is not None:
        arguments += ["-kernel", spec.boot.kernel, "-append", spec.boot.append]
        arguments += ["-initrd", spec.boot.initrd] if spec.boot.initrd else []
    for index, disk in enumerate(spec.disks):
        file = {"driver": "file", "filename": disk.path, "read-only": disk.read_only}
        node = {"node-name": f"disk{index}", "driver": disk.format, "read-only": disk.read_only, "file": file}
        arguments += ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive=disk{index}"]
    for index, (network, fd) in enumerate(zip(spec.networks, tap_fds, strict=True)):
        arguments += ["-netdev", f"tap,id=net{index},fd={fd},vhost=off", "-device"]
        arguments += [f"virtio-net-pci,netdev=net{index},mac={network.mac},romfile="]
    arguments += ["-incoming", "defer"] if incoming else []
    return arguments + spec.extra_args
