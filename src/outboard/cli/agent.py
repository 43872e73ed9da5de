"""outboard agent: the host's daemon."""

from __future__ import annotations

from pathlib import Path

import click

from outboard.agent.config import config_dir, runtime_dir


@click.command(epilog="Example: outboard agent --config /etc/outboard/agent.toml")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Default: agent.toml in OUTBOARD_CONFIG_DIR, else /etc/outboard.",
)
def agent(config: Path | None) -> None:
    """Run this host's agent in the foreground: it starts engines, and takes VMs in from the hosts of its cluster."""
    from outboard.agent.config import read_config
    from outboard.agent.daemon import Agent
    from outboard.vmm.registry import Registry

    Agent(read_config(config or config_dir() / "agent.toml"), config_dir() / "pki", Registry(runtime_dir())).serve()
