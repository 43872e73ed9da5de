"""outboard migrate, cancel, limit, switch: move a VM to another host and steer it on its way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click
import msgspec
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from outboard.cli import api
from outboard.cli.output import Bandwidth, Duration, output_option, print_json, size_text
from outboard.cli.plan import show_plan
from outboard.errors import OutboardError, error_of
from outboard.migrate import report
from outboard.migrate.messages import MAX_STREAMS
from outboard.migrate.method import Goal

_decode: msgspec.json.Decoder[report.Progress | report.Summary] = msgspec.json.Decoder(report.Progress | report.Summary)


@click.command(
    epilog="Example: outboard migrate web b --max-downtime 100ms -o ndjson",
    context_settings={"max_content_width": 110},
)
@click.argument("vm")
@click.argument("host")
@click.option(
    "--goal",
    type=click.Choice([goal.value for goal in Goal]),
    help="What matters most: sets what no other option says; see the table in the manual.",
)
@click.option(
    "--enlightened", "method", flag_value="enlightened", default=True, help="Guest-ordered post-copy (default)."
)
@click.option("--post-copy", "method", flag_value="post-copy", help="Switch over at once, fetch pages afterwards.")
@click.option(
    "--pre-copy", "method", flag_value="pre-copy", help="Copy in rounds until the rest fits in --max-downtime."
)
@click.option("--hybrid", "method", flag_value="hybrid", help="Rounds while they help, then post-copy.")
@click.option("--hints/--no-hints", default=True, show_default=True, help="Ask the guest agent which pages matter.")
@click.option(
    "--throttle/--no-throttle", default=True, show_default=True, help="Of --pre-copy: hold back who writes too fast."
)
@click.option("--max-downtime", type=Duration(), default="300ms", show_default=True, help="Longest pause allowed.")
@click.option("--max-bandwidth", type=Bandwidth(), help="Limit, such as 500Mbit; see outboard limit to change it.")
@click.option(
    "--timeout",
    type=Duration(),
    help="Of --pre-copy and --hybrid: switch over after so long, as outboard switch does.",
)
@click.option(
    "--compress",
    type=click.Choice(["auto", "none", "lz4", "zstd"]),
    default="auto",
    show_default=True,
    help="How pages are packed; auto: by what pays on this link.",
)
@click.option(
    "--streams",
    type=click.IntRange(1, MAX_STREAMS),
    help="Connections for the bulk; without it by the processors and the link.",
)
@click.option(
    "--blocks",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Refer to disk images that both hosts have, instead of sending what they hold.",
)
@click.option("--verify", is_flag=True, help="Stay paused until all has arrived and compare digests of every page.")
@click.option("--plan", "planned", is_flag=True, help="Move nothing: watch the VM for 3 s, and say what would happen.")
@click.option("--wait/--detach", default=True, show_default=True, help="Follow it, or return once it has begun.")
@output_option("table", "json", "ndjson")
def migrate(
    vm: str,
    host: str,
    goal: str | None,
    planned: bool,
    wait: bool,
    output: str,
    **options: Any,
) -> None:
    """Move the running VM to HOST, as named in agent.toml.

    With --plan nothing is moved: what each method would do is said as ranges, and what stands in the way; exit code 4
    if anything does.

    Ctrl-C once stops following and lets the migration go on; twice within the command cancels it.
    """
    request = _request(vm, host, goal, options)
    if planned:
        show_plan(api.call("POST", "/v1/plans", request), output)
        return
    migration = api.call("POST", "/v1/migrations", request)["migration"]
    if not wait:
        if output == "table":
            click.echo(migration)
        else:
            print_json({"schema": "outboard.migration.begun.v1", "migration": migration})
        return
    _follow(migration, output)


def _request(vm: str, host: str, goal: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the agent is asked for: of the options those that were said, the others are the goal's."""
    context = click.get_current_context()
    said = {name: value for name, value in options.items() if _was_said(context, name)}
    return {"vm": vm, "host": host, "goal": goal, "options": said}


def _was_said(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


class _Interrupts:
    """Ctrl-C: the first asks what is meant, the second cancels."""

    def __init__(self, migration: str) -> None:
        self._migration = migration
        self._count = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            try:
                api.call("POST", f"/v1/migrations/{self._migration}/cancel")
            except OutboardError as error:
                click.echo(f"\n{error}", err=True)
            return
        signal.signal(signal.SIGALRM, self._detach)
        signal.alarm(2)
        click.echo("\ndetaching; the migration goes on. Ctrl-C again within 2 s cancels it.", err=True)

    def _detach(self, _number: int, _frame: FrameType | None) -> None:
        if self._count == 1:
            raise KeyboardInterrupt


def _follow(migration: str, output: str) -> None:
    signal.signal(signal.SIGINT, _Interrupts(migration))
    lines = api.lines(f"/v1/migrations/{migration}/reports")
    summary: report.Summary | None = None
    if output == "table":
        summary = _draw(lines)
    else:
        for line in lines:
            decoded = _read(line)
            if output == "ndjson" or isinstance(decoded, report.Summary):
                click.echo(line)
            if isinstance(decoded, report.Summary):
                summary = decoded
    if summary is None:
        raise error_of(
            1,
            f"the engine of migration {migration} died before the VM was given away: it goes on at the source, if its "
            "QEMU lives; see the agent's log",
        )
    if output == "table":
        _print_summary(summary)
    if summary.error is not None:
        raise error_of(summary.exit_code, f"migration {migration} {summary.state.value}: {summary.error}")


def _read(line: str) -> report.Progress | report.Summary:
    try:
        return _decode.decode(line)
    except msgspec.ValidationError:
        refused = msgspec.json.decode(line)
        raise error_of(refused.get("exit_code", 1), refused.get("why", line)) from None


def _draw(lines: Iterator[str]) -> report.Summary | None:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0, phase="", visible=console.is_terminal)
        said = ""
        for line in lines:
            decoded = _read(line)
            if isinstance(decoded, report.Summary):
                return decoded
            eta = f", {decoded.eta[0]:.0f} to {decoded.eta[1]:.0f} s left" if decoded.eta else ""
            words = f"{size_text(decoded.remaining_bytes)} left, {size_text(decoded.rate)}/s{eta}; {decoded.verdict}"
            bar.update(task, completed=decoded.fraction, description=words, phase=decoded.state.value)
            if not console.is_terminal and decoded.state.value != said:
                said = decoded.state.value
                click.echo(f"{decoded.elapsed:6.2f} s  {said}", err=True)
    return None


def content_words(summary: report.Summary) -> str:
    """What packing has done, in words."""
    ways = [f"{pages} pages by {name}" for name, pages in summary.codecs.items() if name != "none"]
    if summary.reference_pages:
        ways.append(f"{summary.reference_pages} as references")
    if summary.changed_pages:
        ways.append(f"{summary.changed_pages} as changes")
    if not ways:
        return "as it is"
    return (
        f"{size_text(summary.content_bytes)} in {size_text(summary.packed_bytes)}: {', '.join(ways)}; "
        f"{summary.codec_s:.2f} s of the processor"
    )


def _after(summary: report.Summary) -> str:
    if not summary.large_mappings_before:
        return "0"
    return "unknown" if summary.large_mappings_after is None else str(summary.large_mappings_after)


def _print_summary(summary: report.Summary) -> None:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    def us(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f} us"

    resume = "-" if summary.time_to_resume_s is None else f"{summary.time_to_resume_s:.2f} s"
    rows = [
        ("state", f"{summary.state.value}; the VM is at the {summary.safe_at.value}"),
        ("method", f"{summary.method.value}; hints: {summary.hints}"),
        (
            "total",
            f"{summary.total_s:.2f} s, running at the destination after {resume}, blackout {ms(summary.blackout_ms)}",
        ),
        (
            "sent",
            f"{size_text(summary.bytes)}: {summary.data_pages} pages, {summary.zero_pages} zero, "
            f"{summary.urgent_pages} on demand, {summary.resent_pages} again; "
            f"{summary.never_sent_pages} of {summary.pages} never",
        ),
        ("content", content_words(summary)),
        (
            "faults",
            f"{summary.remote_faults or 0} remote, p50 {us(summary.fault_p50_us)}, p99 {us(summary.fault_p99_us)}",
        ),
        (
            "large",
            f"{summary.large_mappings_before or 0} mappings of 2 MiB before, {_after(summary)} after",
        ),
        ("verified", {None: "not asked for", True: "every page equal", False: "DIFFERENT"}[summary.verified]),
    ]
    for name, words in rows:
        click.echo(f"{name:<9} {words}")
    sys.stdout.flush()


@click.command(epilog="Example: outboard cancel web")
@click.argument("name")
def cancel(name: str) -> None:
    """Cancel a migration, by its id or its VM; the VM goes on at the source.

    After the switch-over it is too late, and refused.
    """
    api.call("POST", f"/v1/migrations/{name}/cancel")


@click.command(epilog="Example: outboard limit web 200Mbit")
@click.argument("name")
@click.argument("rate", type=str, required=False)
@click.option("--max-downtime", type=Duration(), help="Longest pause allowed from now on.")
def limit(name: str, rate: str | None, max_downtime: float | None) -> None:
    """Change the bandwidth limit of a running migration; RATE is such as 500Mbit, or none."""
    wanted: dict[str, float | None] = {}
    if rate is not None:
        wanted["max_bandwidth"] = None if rate == "none" else Bandwidth().convert(rate, None, None)
    if max_downtime is not None:
        wanted["max_downtime"] = max_downtime
    if not wanted:
        raise click.UsageError("say what to change: a RATE, --max-downtime, or both")
    api.call("PATCH", f"/v1/migrations/{name}", wanted)


@click.command(epilog="Example: outboard switch web")
@click.argument("name")
def switch(name: str) -> None:
    """Have a running migration copy no longer and switch over now, by its id or its VM.

    With --hybrid the VM goes on at the destination at once, and what is left follows, faults first. With --pre-copy it
    stands still until all that is left is there. The other methods switch over early by themselves.
    """
    api.call("POST", f"/v1/migrations/{name}/switch")
