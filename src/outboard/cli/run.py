"""outboard run and outboard stop: VMs whose memory can be moved."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from outboard.agent.config import runtime_dir
from outboard.agent.promises import admitted
from outboard.cli.output import output_option, print_json, print_table
from outboard.errors import NotFoundError
from outboard.vmm import launch
from outboard.vmm.registry import Registry, VmRecord
from outboard.vmm.spec import read_spec


class Started(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.run.v1"):
    """A VM that runs, and where to reach it."""

    vm: str
    pid: int
    accelerator: str
    accelerator_reason: str
    memory_bytes: int
    vcpus: int
    qmp: str
    console: str


@click.command(epilog="Example: outboard run web.toml")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), help="Instead of what FILE says.")
@output_option("table", "json")
def run(file: Path, accel: str | None, output: str) -> None:
    """Start the VM that FILE describes, so that its memory can be managed and moved.

    Returns when QEMU runs; the VM goes on until its guest powers off, outboard stop, or outboard migrate.
    """
    spec = read_spec(file)
    if accel is not None:
        spec = msgspec.structs.replace(spec, accel=accel)
    registry = Registry(runtime_dir())
    with admitted(spec, registry):
        record = launch.launch(spec, registry)
    if output == "json":
        print_json(
            Started(
                vm=record.name,
                pid=record.pid,
                accelerator=record.accelerator,
                accelerator_reason=record.accelerator_reason,
                memory_bytes=record.memory_bytes,
                vcpus=record.vcpus,
                qmp=str(record.qmp_socket),
                console=str(record.console),
            )
        )
        return
    columns = ["vm", "pid", "accelerator", "memory", "vcpus", "monitor"]
    row = [record.name, str(record.pid), record.accelerator, spec.memory, str(record.vcpus)]
    print_table(columns, [[*row, str(record.qmp_socket)]], empty="")
    if spec.accel == "auto" and record.accelerator == "tcg":
        click.echo(f"{record.name} runs many times slower than it could: {record.accelerator_reason}", err=True)


class Stopped(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.stop.v1"):
    """A VM that is gone."""

    vm: str


@click.command(epilog="Example: outboard stop web")
@click.argument("vm")
@output_option("table", "json")
def stop(vm: str, output: str) -> None:
    """End a VM at once, like pulling its plug, and forget it.

    Ask the guest to power off first if it has something to lose.
    """
    registry = Registry(runtime_dir())
    launch.stop(_find(registry, vm), registry)
    if output == "json":
        print_json(Stopped(vm=vm))
    else:
        click.echo(f"{vm} has ended")


def _find(registry: Registry, vm: str) -> VmRecord:
    """The VM, also one whose QEMU has ended by itself."""
    try:
        return registry.get(vm)
    except NotFoundError:
        for record in registry.list():
            if record.name == vm:
                return record
        raise
