"""outboard history, explain: how migrations that began on this host ended, and why."""

from __future__ import annotations

import time

import click

from outboard.agent.config import state_dir
from outboard.agent.history import History
from outboard.cli.output import output_option, print_json, print_table, size_text
from outboard.errors import NotFoundError
from outboard.migrate.explain import explain as words_of


@click.command(epilog="Example: outboard history web --last 5 -o ndjson")
@click.argument("vm", required=False)
@click.option("--last", type=click.IntRange(1), default=20, show_default=True, help="How many, the newest first.")
@output_option("table", "ndjson")
def history(vm: str | None, last: int, output: str) -> None:
    """Show the summaries of migrations, of one VM or of all."""
    summaries = History(state_dir() / "history.db").read(vm, last)
    if output == "ndjson":
        for summary in summaries:
            print_json(summary)
        return
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.started)),
            one.vm,
            f"{one.source} -> {one.destination}",
            one.method.value,
            one.state.value,
            f"{one.total_s:.2f} s",
            "-" if one.blackout_ms is None else f"{one.blackout_ms:.0f} ms",
            size_text(one.bytes),
            one.error or "",
        ]
        for one in summaries
    ]
    columns = ["began", "vm", "hosts", "method", "state", "total", "blackout", "sent", "error"]
    print_table(columns, rows, empty="no migration has begun on this host yet")


@click.command(epilog="Example: outboard explain web")
@click.argument("name")
def explain(name: str) -> None:
    """Say in words how a migration went: why it did or did not converge, and what was tried.

    NAME is the migration's id, or that of a VM, whose latest one is told of.
    """
    found = History(state_dir() / "history.db").find(name)
    if found is None:
        raise NotFoundError(f"no migration {name} and none of a VM of that name has ended here; see outboard history")
    for sentence in words_of(found):
        click.echo(sentence)
