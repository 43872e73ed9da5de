"""The commands. Each lives in the module of its name and is imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys

import click

from outboard.errors import OutboardError

_COMMANDS = {
    "agent": "outboard.cli.agent:agent",
    "attach": "outboard.cli.attach:attach",
    "blocks": "outboard.cli.blocks:blocks",
    "cancel": "outboard.cli.migrate:cancel",
    "dirty": "outboard.cli.dirty:dirty",
    "doctor": "outboard.cli.doctor:doctor",
    "engine": "outboard.cli.memory:engine",
    "evict": "outboard.cli.memory:evict",
    "explain": "outboard.cli.history:explain",
    "fetch": "outboard.cli.memory:fetch",
    "heat": "outboard.cli.heat:heat",
    "history": "outboard.cli.history:history",
    "limit": "outboard.cli.migrate:limit",
    "switch": "outboard.cli.migrate:switch",
    "ls": "outboard.cli.attach:ls",
    "migrate": "outboard.cli.migrate:migrate",
    "mrc": "outboard.cli.mrc:mrc",
    "numa": "outboard.cli.numa:numa",
    "pki": "outboard.cli.pki:pki",
    "reclaim": "outboard.cli.swap:reclaim",
    "recover": "outboard.cli.blocks:recover",
    "release": "outboard.cli.memory:release",
    "residency": "outboard.cli.memory:residency",
    "run": "outboard.cli.run:run",
    "sharing": "outboard.cli.sharing:sharing",
    "snapshot": "outboard.cli.snapshot:snapshot",
    "stop": "outboard.cli.run:stop",
    "swap": "outboard.cli.swap:swap",
    "wss": "outboard.cli.wss:wss",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        place = _COMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{place} is no command")
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="outboard")
def outboard() -> None:
    """Manage the memory of running virtual machines from outside the VMM.

    \b
    Exit codes: 0 done; 1 failed, the VM is safe at the source; 2 usage; 3 not found; 4 refused by a check;
    5 cancelled, the VM is safe at the source; 6 paused, needs recovery; 7 not authorised; 8 unreachable;
    130 interrupted.
    """


def main() -> None:
    """Run a command; the one place that turns an error into words and an exit code."""
    try:
        outboard(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OutboardError as error:
        click.echo(f"outboard: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
