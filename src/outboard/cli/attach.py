"""outboard attach, ls: look at a QEMU as Outboard sees it, and at what runs on this host."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from outboard.agent.config import runtime_dir
from outboard.cli.output import C, output_option, print_json, print_table, size_text
from outboard.errors import RefusedError, UsageError
from outboard.pages import PAGE_SIZE
from outboard.vmm.attach import attach as attach_to
from outboard.vmm.guest import Guest, QemuGuest
from outboard.vmm.process import attach_process
from outboard.vmm.registry import Registry


class RegionReport(msgspec.Struct, frozen=True):
    """A region of memory; addresses and sizes in bytes."""

    gpa: int
    size: int
    hva: int
    file: str
    offset: int
    page_size: int


class GuestReport(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.guest.v1"):
    """What attaching found."""

    vm: str
    pid: int
    regions: list[RegionReport]
    vcpu_threads: list[int]
    guest_agent: str | None


class VmReport(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.vm.v1"):
    """A VM of this host."""

    vm: str
    pid: int
    running: bool
    accelerator: str
    memory: int
    vcpus: int


def open_guest(vm: str | None, qmp: Path | None, pid: int | None, *, managed: bool = False) -> QemuGuest:
    """Attach to the VM that a command names in one of three ways.

    :param managed: as in :func:`outboard.vmm.attach.attach`.
    :raise UsageError: it names none, or several.
    """
    if sum(one is not None for one in (vm, qmp, pid)) != 1:
        raise UsageError("name one VM: by its name, by --qmp SOCKET, or by --pid PID")
    if vm is not None:
        return Registry(runtime_dir()).get(vm).attach(managed=managed)
    return attach_to(qmp=qmp, pid=pid, managed=managed)


def open_memory(vm: str | None, qmp: Path | None, pid: int | None) -> Guest:
    """As :func:`open_guest`, for what looks at memory only: it may be managed, and ``pid`` be any process with shared
    memory."""
    try:
        return open_guest(vm, qmp, pid, managed=True)
    except RefusedError as error:
        if pid is None or error.reason != "not-qemu":
            raise
        return attach_process(pid)


def memory_options(command: C) -> C:
    """How a command names what :func:`open_memory` opens."""
    for option in (
        click.option("--pid", type=int, help="A QEMU that Outboard did not start, or any process with shared memory."),
        click.option(
            "--qmp", type=click.Path(path_type=Path), help="A QEMU that Outboard did not start, by its QMP socket."
        ),
        click.argument("vm", required=False),
    ):
        command = option(command)
    return command


@click.command(epilog="Example: outboard attach --pid 4711 -o json")
@click.argument("vm", required=False)
@click.option("--qmp", type=click.Path(path_type=Path), help="A QEMU that Outboard did not start, by its QMP socket.")
@click.option("--pid", type=int, help="A QEMU that Outboard did not start, by its process.")
@output_option("table", "json")
def attach(vm: str | None, qmp: Path | None, pid: int | None, output: str) -> None:
    """Check that a VM's memory can be managed, and show how it is laid out. The VM is not changed.

    Exits with 4 and a reason where it cannot: anonymous or private memory, VFIO, vhost-user, a confidential VM, a
    userfaultfd of somebody else's, missing privilege.
    """
    with open_guest(vm, qmp, pid) as guest:
        regions = [
            RegionReport(
                region.gpa, region.pages * PAGE_SIZE, region.hva, region.mapping.path, region.offset, region.page_size
            )
            for region in guest.regions
        ]
        threads = [vcpu.tid for vcpu in guest.vcpus]
        agent = None if guest.agent_path is None else str(guest.agent_path)
        found = GuestReport(guest.name, guest.pid, regions, threads, agent)
    if output == "json":
        print_json(found)
        return
    click.echo(f"{found.vm}: process {found.pid}, vCPU threads {', '.join(map(str, found.vcpu_threads))}")
    click.echo(f"guest agent: {found.guest_agent or 'none, so no hints for the order of pages'}")
    rows = [
        [
            f"{one.gpa:#x}",
            size_text(one.size),
            f"{one.hva:#x}",
            f"{one.file} + {one.offset:#x}",
            size_text(one.page_size),
        ]
        for one in found.regions
    ]
    print_table(["guest address", "size", "in QEMU at", "file", "pages of"], rows, empty="no memory")


@click.command(epilog="Example: outboard ls -o ndjson")
@output_option("table", "ndjson")
def ls(output: str) -> None:
    """List the VMs that Outboard started or took in on this host."""
    found = [
        VmReport(one.name, one.pid, one.alive, one.accelerator, one.memory_bytes, one.vcpus)
        for one in Registry(runtime_dir()).list()
    ]
    if output == "ndjson":
        for one in found:
            print_json(one)
        return
    rows = [
        [
            one.vm,
            str(one.pid),
            "running" if one.running else "ended",
            one.accelerator,
            size_text(one.memory),
            str(one.vcpus),
        ]
        for one in found
    ]
    print_table(
        ["vm", "pid", "state", "by", "memory", "vcpus"], rows, empty="no VM runs here; start one with outboard run"
    )
