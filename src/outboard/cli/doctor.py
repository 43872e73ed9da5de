"""outboard doctor: whether this host can take VMs in and give them away, and how to mend what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outboard.cli import host_checks, setup_checks
from outboard.cli.findings import Finding, Verdict
from outboard.cli.output import output_option, print_json
from outboard.errors import RefusedError

_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    host_checks.privileges,
    host_checks.userfaultfd,
    host_checks.injection,
    host_checks.kvm,
    host_checks.memory,
    host_checks.qemu,
    host_checks.network,
    host_checks.cpu_limits,
    host_checks.leases,
    setup_checks.directories,
    setup_checks.configuration,
    setup_checks.swap,
    setup_checks.guests,
)
"""In the order in which they are printed: what stands earlier explains what stands later."""

_STYLE = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.REFUSED: "bold red"}


class Diagnosis(msgspec.Struct, frozen=True, tag_field="schema", tag="outboard.doctor.v1"):
    """All that was found; ``able`` is whether nothing refused."""

    able: bool
    findings: list[Finding]


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found", "what follows"):
        table.add_column(column, no_wrap=column in ("check", ""))
    for one in findings:
        follows = Text(one.follows)
        if one.mend:
            follows.append(f"\nto mend: {one.mend}", style="bold")
        table.add_row(Text(one.check), Text(one.verdict.value, style=_STYLE[one.verdict]), Text(one.found), follows)
    Console().print(table)


@click.command(epilog="Example: outboard doctor -o json")
@output_option("table", "json")
def doctor(output: str) -> None:
    """Check this host: privileges, kernel, memory, QEMU, and how it has been set up.

    Each line says what was found, what follows from it, and how to mend it. Exits with 0 when this host can migrate
    VMs, and with 4 when a check refuses. A note is no refusal.
    """
    findings = [finding for check in _CHECKS for finding in check()]
    refused = [one.check for one in findings if one.verdict is Verdict.REFUSED]
    if output == "json":
        print_json(Diagnosis(able=not refused, findings=findings))
    else:
        _print(findings)
    if refused:
        raise RefusedError("doctor", f"this host cannot migrate VMs as it is: {', '.join(refused)}")
