"""A session: runs one after another, each on a testbed and VMs of its own, and the document that they make."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from outboard.errors import OutboardError

from .arms import Arm
from .document import Document, Settings, summarise
from .figures import Run, settle_losses
from .hosts import TestbedError
from .machine import machine
from .outboard_arms import outboard_arms
from .qemu_arms import qemu_arms
from .scene import Workload, play

LIMIT_S = 20.0
"""What an arm is given."""
THROTTLED_LIMIT_S = 45.0
"""What auto-converge is given: its throttle takes about 30 s to reach what the guest writes."""
WINDOW_S = 20.0
"""Over which operations lost are counted."""


def all_arms() -> list[Arm]:
    """The arms of the demo, in the report's order."""
    return [*outboard_arms(LIMIT_S), *qemu_arms(LIMIT_S, THROTTLED_LIMIT_S)]


class Session:
    """Plays runs and collects them; one line of progress a run.

    :param shape: of the link, a key of demo.hosts.SHAPES.
    """

    def __init__(self, workload: Workload, shape: str, console: Console) -> None:
        self._workload = workload
        self._shape = shape
        self._console = console
        self._limits: dict[str, float] = {}
        self._runs: list[Run] = []
        self.failures = 0

    def play(self, arm: Arm, *, churned: bool = True) -> None:
        """Run an arm once; one that fails is told and counted in :attr:`failures`, and the session goes on."""
        name = arm.name if churned else f"{arm.name} (unchurned)"
        began = time.monotonic()
        with self._console.status(name) as status:
            try:
                run = play(
                    arm, self._workload, self._shape, lambda what: status.update(f"{name}: {what}"), churned=churned
                )
            except (TestbedError, OutboardError) as error:
                self.failures += 1
                self._console.print(f"{name}: [red]failed[/red]: ", Text(str(error)), sep="")
                return
        self._runs.append(run)
        self._limits[arm.name] = arm.limit_s
        outcome = run.outcome
        ended = outcome.note if outcome.total_s is None else f"source free after {outcome.total_s:.2f} s"
        verdict = "verified" if run.verified else f"NOT VERIFIED: {'; '.join(run.checks[:3])}"
        self._console.print(f"{name}: {ended}, {verdict} [dim]({time.monotonic() - began:.0f} s)[/dim]")

    def play_in_turn(self, arms: Sequence[Arm], runs: int, *, unchurned: bool = False) -> None:
        """Run every arm *runs* times, taking turns: a machine that slows down meanwhile slows all of them."""
        for _ in range(runs):
            for arm in arms:
                self.play(arm)
                if unchurned:
                    self.play(arm, churned=False)

    def document(self) -> Document:
        """Everything so far.

        :raise TestbedError: no run succeeded.
        """
        if not self._runs:
            raise TestbedError("there is nothing to report: no run succeeded")
        settle_losses(self._runs, WINDOW_S)
        workload = self._workload
        return Document(
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            machine=machine(self._runs[-1].accelerator),
            settings=Settings(
                shape=self._shape,
                memory=workload.memory,
                writes_per_s=workload.writes_per_s,
                working_set_mib=workload.working_set_mib,
                churn_mib=workload.churn_mib,
                connections=workload.connections,
                window_s=WINDOW_S,
                limit_s=self._limits,
            ),
            arms=summarise(self._runs),
            runs=self._runs,
        )
