"""script/bench scale: what a migration costs against memory size, vCPUs, and migrations at once.

Two agents on this machine, over the loopback. The VMs boot nothing: their firmware waits, and their memory is filled
from outside, with random bytes, as far as ``--fill`` says; so what grows is Outboard's own cost. A sparse VM has 64 MiB
of data in as much address space as asked for. Each case is a VM of its own, moved once by each method.

Beside the times, the most memory that Outboard's processes took at each end while it went (proportional set size, the
agent and the server that forks engines included), and what the agent alone takes.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from outboard.errors import KernelError
from outboard.linux import proc
from outboard.pages import PAGE_SIZE
from outboard.vmm.registry import VmRecord
from tests.support.cluster import Cluster, Host, summary_of

MIB, GIB = 1 << 20, 1 << 30
SPARSE_DATA = 64 * MIB
_LIMIT_S = 1800.0
_SAMPLE_S = 0.1
_AT_ONCE = 1024
"""Pages written in one call."""


@dataclass(frozen=True)
class Case:
    """One or more VMs alike that move together; sizes in bytes."""

    kind: str
    memory: int
    data: int
    vcpus: int = 1
    at_once: int = 1


class Row(msgspec.Struct, frozen=True):
    """What one case took by one method; of several VMs the median, and the sum of bytes. ``rate`` in MB/s."""

    case: str
    method: str
    memory_mib: int
    data_mib: int
    vcpus: int
    at_once: int
    total_s: float
    resume_s: float
    blackout_ms: float
    sent_mb: float
    rate: float
    attach_ms: float
    arm_ms: float | None
    source_mib: float
    destination_mib: float
    agent_mib: float


def cases(
    sizes: tuple[float, ...], sparse: tuple[float, ...], vcpus: tuple[int, ...], many: int, fill: float
) -> list[Case]:
    """All that is asked for; sizes in GiB."""
    made = [Case("size", int(size * GIB), int(fill * size * GIB)) for size in sizes]
    made += [Case("sparse", int(size * GIB), SPARSE_DATA) for size in sparse]
    made += [Case("vcpus", GIB, int(fill * GIB), vcpus=count) for count in vcpus]
    return made + ([Case("at once", GIB // 2, int(fill * GIB / 2), at_once=many)] if many else [])


def fill(record: VmRecord, size: int, random: np.random.Generator) -> None:
    """Give pages that the guest has not touched random content, ``size`` bytes of them."""
    with record.attach() as guest:
        left = size // PAGE_SIZE
        for first, count in ~guest.memory.populated():
            for at in range(first, first + min(count, left), _AT_ONCE):
                pages = min(_AT_ONCE, first + min(count, left) - at)
                guest.memory.write(at, memoryview(random.bytes(pages * PAGE_SIZE)))
            left -= min(count, left)


def proportional_mib(host: Host, *, agent_alone: bool = False) -> float:
    """What Outboard's processes of a host take now."""
    octets = 0
    for entry in [Path(f"/proc/{host.agent_pid}")] if agent_alone else list(Path("/proc").glob("[0-9]*")):
        # Processes come and go meanwhile.
        with contextlib.suppress(OSError, KernelError):
            ours = (entry / "comm").read_text().startswith(("outboard", "python"))
            if ours and _descends(int(entry.name), host.agent_pid):
                line = next(one for one in (entry / "smaps_rollup").read_text().splitlines() if one.startswith("Pss:"))
                octets += int(line.split()[1]) * 1024
    return octets / MIB


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = proc.parent(pid)
    return False


@contextlib.contextmanager
def peaks(hosts: list[Host]) -> Iterator[Callable[[], list[float]]]:
    """Watch what Outboard's processes take while this lasts; the most that each host's did."""
    most = [0.0] * len(hosts)
    ending = threading.Event()

    def look() -> None:
        while not ending.wait(_SAMPLE_S):
            most[:] = [max(peak, proportional_mib(host)) for peak, host in zip(most, hosts, strict=True)]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: most
    finally:
        ending.set()
        thread.join()


def measure(cluster: Cluster, case: Case, method: str, random: np.random.Generator) -> Row:
    """Start the VMs of a case, move them together, and end them."""
    names = [f"scale-{index}" for index in range(case.at_once)]
    hosts = [cluster.a, cluster.b]
    try:
        for name in names:
            spec = cluster.root / f"{name}.toml"
            spec.write_text(
                f'name = "{name}"\nmemory = "{case.memory // MIB}MiB"\nvcpus = {case.vcpus}\naccel = "tcg"\n'
                "guest_agent = false\n"
            )
            done = cluster.a.outboard("run", str(spec))
            if done.returncode:
                raise click.ClickException(done.stderr)
            fill(cluster.a.registry.get(name), case.data, random)
        agent = proportional_mib(cluster.a, agent_alone=True)
        with peaks(hosts) as most:
            moves = [cluster.a.popen("migrate", name, "b", "-o", "json", f"--{method}") for name in names]
            outputs = [move.communicate(timeout=_LIMIT_S) for move in moves]
            source, destination = most()
        for move, (_, errors) in zip(moves, outputs, strict=True):
            if move.returncode:
                raise click.ClickException(errors)
    finally:
        for host in hosts:
            for name in names:
                if host.has(name):
                    host.outboard("stop", name)
    found = [summary_of(output) for output, _ in outputs]

    def middle(key: str) -> float:
        return float(statistics.median(one[key] for one in found))

    sent, total = sum(one["bytes"] for one in found), middle("total_s")
    return Row(
        case=case.kind,
        method=method,
        memory_mib=case.memory // MIB,
        data_mib=case.data // MIB,
        vcpus=case.vcpus,
        at_once=case.at_once,
        total_s=total,
        resume_s=middle("time_to_resume_s"),
        blackout_ms=middle("blackout_ms"),
        sent_mb=sent / 1e6,
        rate=sent / 1e6 / total,
        attach_ms=middle("attach_ms"),
        arm_ms=None if found[0]["arm_ms"] is None else middle("arm_ms"),
        source_mib=source,
        destination_mib=destination,
        agent_mib=agent,
    )


def growth(rows: list[Row], key: str) -> tuple[float, float] | None:
    """What ``key`` of the size cases is at nothing, and what each GiB adds: the line of least squares."""
    points = [(row.memory_mib / 1024, getattr(row, key)) for row in rows if row.case == "size"]
    if len({size for size, _ in points}) < 2:
        return None
    slope, base = np.polyfit([size for size, _ in points], [value for _, value in points], 1)
    return float(base), float(slope)


def show(rows: list[Row], console: Console) -> None:
    """Print the rows, and the growth by size of each method."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("case", "method", "memory", "data", "vCPUs", "VMs", "total", "resume", "blackout", "sent", "rate"):
        table.add_column(heading, justify="left" if heading in ("case", "method") else "right")
    for heading in ("attach", "arm", "source", "dest.", "agent"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.case,
            row.method,
            f"{row.memory_mib:,} MiB",
            f"{row.data_mib:,} MiB",
            str(row.vcpus),
            str(row.at_once),
            f"{row.total_s:.2f} s",
            f"{row.resume_s:.2f} s",
            f"{row.blackout_ms:.0f} ms",
            f"{row.sent_mb:,.0f} MB",
            f"{row.rate:.0f} MB/s",
            f"{row.attach_ms:.0f} ms",
            "-" if row.arm_ms is None else f"{row.arm_ms:.1f} ms",
            f"{row.source_mib:.0f} MiB",
            f"{row.destination_mib:.0f} MiB",
            f"{row.agent_mib:.0f} MiB",
        )
    console.print(table)
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        for key, unit in (("total_s", "s"), ("blackout_ms", "ms"), ("source_mib", "MiB"), ("destination_mib", "MiB")):
            if (line := growth(mine, key)) is not None:
                console.print(f"{method} {key}: {line[0]:.2f} {unit} + {line[1]:.2f} {unit} a GiB of memory")


@click.command()
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--size", "sizes", type=float, multiple=True, default=(0.5, 1, 2, 4, 8), show_default=True, help="GiB.")
@click.option(
    "--sparse", type=float, multiple=True, default=(64, 512), show_default=True, help="GiB, mostly untouched."
)
@click.option("--vcpus", type=int, multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option("--at-once", default=8, show_default=True, help="Migrations at once; 0: none.")
@click.option("--fill", "share", default=0.25, show_default=True, help="The part of memory that holds data.")
@click.option("--method", "methods", multiple=True, default=("post-copy", "pre-copy"), show_default=True)
def main(
    file: Path | None,
    sizes: tuple[float, ...],
    sparse: tuple[float, ...],
    vcpus: tuple[int, ...],
    at_once: int,
    share: float,
    methods: tuple[str, ...],
) -> None:
    """Measure how the cost of a migration grows."""
    random, rows, console = np.random.default_rng(0), [], Console(stderr=True)
    with Cluster() as cluster:
        for case in cases(sizes, sparse, vcpus, at_once, share):
            for method in methods:
                began = time.monotonic()
                rows.append(measure(cluster, case, method, random))
                console.print(f"{case.kind} {case.memory // MIB} MiB {method}: {time.monotonic() - began:.0f} s")
    show(rows, Console(width=200))
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1))


if __name__ == "__main__":
    main()
