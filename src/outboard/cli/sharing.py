"""outboard sharing: equal pages of VMs kept once."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import click
import msgspec
import numpy as np
from click.core import ParameterSource

from outboard.agent import merging
from outboard.agent.config import config_dir, read_config, runtime_dir
from outboard.agent.domains import Stop, Tell, Told, active, ask_domain
from outboard.agent.sharer import domain_directory
from outboard.cli.api import call
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.errors import NotFoundError, RefusedError, UsageError
from outboard.linux import ksm
from outboard.pages import PAGE_SIZE
from outboard.sharing.domain import Domain, Found
from outboard.sharing.looking import Looked
from outboard.sharing.pool import Pool
from outboard.sharing.scan import SECRET
from outboard.vmm.guest import Guest
from outboard.vmm.process import attach_anonymous
from outboard.vmm.registry import Registry
from outboard.vmm.spec import parse_size

_NOT_KSM = {
    "every": "ksmd has its own pace, /sys/kernel/mm/ksm/pages_to_scan and sleep_millisecs",
    "reads": "the kernel looks at nobody's reads",
    "break_below": "the kernel breaks large pages whenever it merges inside them",
    "rebuild_above": "khugepaged makes large pages again",
}


class Scanned(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.sharing-scan.v1"):
    """What sharing would free; bytes, and bytes/s of one processor."""

    vms: list[str]
    scanned: int
    unstable: int
    equal: int
    contents: int
    zeros: int
    shareable: int
    scan_rate: float
    inside: int


@click.group()
def sharing() -> None:
    """Pages that VMs have in common, kept in memory once.

    A domain is a VM alone, or VMs that the administrator has named under [sharing] in agent.toml: what two VMs share,
    each can find out about the other by how long a write takes.
    """


def _members(names: tuple[str, ...]) -> list[str]:
    """VMs, and domains of the configuration, as VMs; each once."""
    path = config_dir() / "agent.toml"
    domains = read_config(path).sharing if path.exists() else {}
    return list(dict.fromkeys(vm for name in names for vm in domains.get(name, [name])))


@sharing.command(epilog="Example: outboard sharing scan web-1 web-2")
@click.argument("names", metavar="VM|DOMAIN...", nargs=-1, required=True)
@click.option(
    "--pause", type=click.FloatRange(0, 3600), default=2.0, show_default=True, help="Seconds between the scans."
)
@output_option("table", "json")
def scan(names: tuple[str, ...], pause: float, output: str) -> None:
    """Say what sharing would free, and change nothing. A page counts if two scans find the same in it."""
    registry = Registry(runtime_dir())
    with contextlib.ExitStack() as until_end:
        members = [until_end.enter_context(Looked(registry.get(vm))) for vm in _members(names)]
        fd = os.memfd_create("outboard-scan", os.MFD_CLOEXEC)
        until_end.callback(os.close, fd)
        pool = Pool(Path(f"/proc/self/fd/{fd}"), np.random.default_rng(), slots=1)
        until_end.callback(pool.close)
        domain = Domain(members, pool, np.frombuffer(os.urandom(SECRET), dtype=np.uint8).copy())
        domain.scan()
        time.sleep(pause)
        found = domain.scan()
        inside = round(domain.inside().pages * PAGE_SIZE)
        _tell_scan([member.name for member in members], found, inside, domain.speed(), output)


def _tell_scan(vms: list[str], found: Found, inside: int, rate: float, output: str) -> None:
    if output == "json":
        print_json(
            Scanned(
                vms=vms,
                scanned=found.scanned * PAGE_SIZE,
                unstable=found.unstable * PAGE_SIZE,
                equal=found.equal * PAGE_SIZE,
                contents=found.contents * PAGE_SIZE,
                zeros=found.zeros * PAGE_SIZE,
                shareable=found.shareable * PAGE_SIZE,
                scan_rate=rate,
                inside=inside,
            )
        )
        return
    click.echo(
        f"{', '.join(vms)}: sharing would free {size_text(found.shareable * PAGE_SIZE)} of "
        f"{size_text(found.scanned * PAGE_SIZE)} in memory"
    )
    click.echo(
        f"{size_text(found.equal * PAGE_SIZE)} are {size_text(found.contents * PAGE_SIZE)} of different content, "
        f"{size_text(found.zeros * PAGE_SIZE)} zeros; {size_text(found.unstable * PAGE_SIZE)} were being written; "
        f"scanned at {size_text(rate)}/s on one processor"
    )
    if inside:
        click.echo(f"inside large pages, which stay large: {size_text(inside)} more, if they were broken")


def _size(option: str, text: str | None) -> int:
    try:
        return 0 if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


@sharing.command(epilog="Example: outboard sharing start blue --every 30")
@click.argument("domain", metavar="VM|DOMAIN")
@click.option(
    "--every", type=click.FloatRange(0.05), default=10.0, show_default=True, help="Seconds between two scans."
)
@click.option(
    "--reads",
    type=click.FloatRange(0.05),
    default=1.0,
    show_default=True,
    help="Seconds between two looks at how shared pages are read.",
)
@click.option("--break-below", metavar="SIZE", help="Break large pages while less memory than this is available.")
@click.option("--rebuild-above", metavar="SIZE", help="Make them large again while more than this is available.")
@click.option(
    "--backend",
    type=click.Choice(["overlay", "ksm"]),
    default="overlay",
    show_default=True,
    help="Who shares: Outboard, memory of VMs; or the kernel's own merging, anonymous memory of --process.",
)
@click.option("--process", "pids", type=int, multiple=True, metavar="PID", help="A process of the domain; for ksm.")
@click.pass_context
def start(
    context: click.Context,
    domain: str,
    every: float,
    reads: float,
    break_below: str | None,
    rebuild_above: str | None,
    backend: str,
    pids: tuple[int, ...],
) -> None:
    """Share equal pages of a domain's VMs from now on, while they run; a page that a VM reads much is un-shared.

    What is equal inside large pages stays there, and they stay large, unless --break-below is given.

    With --backend ksm the kernel merges the anonymous memory of the processes given. It merges with every process of
    the host that lets it, without salts, and un-shares nothing that is read much.
    """
    if backend == "ksm":
        _start_ksm(context, domain, pids)
        return
    if pids:
        raise UsageError("--process is for --backend ksm; a domain's VMs are named in agent.toml")
    if (by_kernel := merging.merging(runtime_dir())) is not None and by_kernel.domain == domain:
        raise RefusedError(
            "sharing", f"the kernel merges the memory of {domain}; outboard sharing stop {domain} ends it"
        )
    large = {
        "break_below": _size("--break-below", break_below),
        "rebuild_above": _size("--rebuild-above", rebuild_above),
    }
    if 0 < large["rebuild_above"] <= large["break_below"]:
        raise UsageError("--rebuild-above is more than --break-below")
    process = call("PUT", f"/v1/sharing/{domain}", {"every_s": every, "reads_s": reads, "large": large})["process"]
    click.echo(f"{domain} shares pages; process {process} scans")


def _start_ksm(context: click.Context, domain: str, pids: tuple[int, ...]) -> None:
    """Leave a domain to the kernel; what that has no notion of is refused."""
    for option, why in _NOT_KSM.items():
        if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise UsageError(f"--{option.replace('_', '-')} is nothing that --backend ksm could follow: {why}")
    root = runtime_dir()
    with contextlib.ExitStack() as until_end:
        guests: list[Guest] = [until_end.enter_context(attach_anonymous(pid)) for pid in dict.fromkeys(pids)]
        if not pids:
            guests = [
                until_end.enter_context(Registry(root).get(vm).attach(managed=True)) for vm in _members((domain,))
            ]
        others = ksm.setting("pages_shared") if ksm.present() else 0
        merging.begin(root, domain, guests)
    click.echo(f"{domain}: the kernel merges what {len(guests)} processes have in common")
    if others:
        click.echo("other processes of this host are merged too, and with these: KSM knows no domains")
    if ksm.setting("run") != 1:
        click.echo("nothing is merged while ksmd is off: echo 1 > /sys/kernel/mm/ksm/run")


@sharing.command(epilog="Example: outboard sharing status blue -o json")
@click.argument("domain", metavar="[VM|DOMAIN]", required=False)
@output_option("table", "json")
def status(domain: str | None, output: str) -> None:
    """Tell what is shared and saved; of every active domain when none is named."""
    root = runtime_dir()
    by_kernel = merging.merging(root)
    if by_kernel is not None and domain not in (None, by_kernel.domain):
        by_kernel = None
    directories = active(root) if domain is None else [] if by_kernel else [domain_directory(root, domain)]
    told = [ask_domain(directory, Tell()) for directory in directories]
    if by_kernel is not None:
        told.append(merging.told(root, by_kernel.domain))
    for one in told:
        _tell(one, output)
    if not told and output == "table":
        click.echo("nothing is shared")


@sharing.command(epilog="Example: outboard sharing stop blue")
@click.argument("domain", metavar="VM|DOMAIN")
@output_option("table", "json")
def stop(domain: str, output: str) -> None:
    """Give every shared page memory of its VM's own again, and share no more; the VMs stay managed."""
    directory = domain_directory(runtime_dir(), domain)
    by_kernel = merging.merging(runtime_dir())
    if by_kernel is not None and by_kernel.domain == domain:
        told = merging.end(runtime_dir(), domain)
    elif directory.exists():
        told = ask_domain(directory, Stop())
    else:
        raise NotFoundError(f"nothing is shared in {domain}; outboard sharing status lists what is")
    if output == "json":
        print_json(told)
    else:
        click.echo(f"{domain} shares nothing any more")


def _tell(told: Told, output: str) -> None:
    if output == "json":
        print_json(told)
        return
    click.echo(
        f"{told.domain}: {size_text(told.saved)} saved: {size_text(told.shared)} shared from a pool of "
        f"{size_text(told.pool)}; {size_text(told.zeros)} of zeros given up;"
    )
    if told.shareable is None or told.scan_rate is None:
        click.echo(f"merged by the kernel (KSM), whose pool is the whole host's; scan {told.scans}")
    else:
        click.echo(
            f"{size_text(told.shareable)} more could be freed; scan {told.scans} at {size_text(told.scan_rate)}/s"
        )
    if told.inside or told.broken:
        click.echo(
            f"inside large pages: {size_text(told.inside)} more, if they were broken; {told.broken} are "
            f"({told.tlb_entries:,} TLB entries more)"
        )
    rows = [
        [
            one.vm,
            size_text(one.shared),
            size_text(one.copied),
            size_text(one.zeros),
            ", ".join(f"{name} {count}" for name, count in one.read_much.items() if count) or "-",
            one.failure or "-",
        ]
        for one in told.members
    ]
    print_table(["VM", "SHARED", "WRITTEN SINCE", "ZEROS", "UN-SHARED BY READS", "FAILURE"], rows, empty="no VMs")
