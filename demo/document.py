"""The document of a session: every run with its recordings, and each arm's figures over its runs.

Written by ``--json``, read back by :func:`load`; the page and the table are drawn from it alone.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .figures import Run, Spread

SCHEMA = "outboard.demo/1"

FIGURES = (
    "time_to_resume_s",
    "blackout_ms",
    "longest_gap_ms",
    "total_s",
    "bytes",
    "remote_faults",
    "fault_p50_us",
    "fault_p99_us",
    "ops_before",
    "ops_during",
    "ops_after",
    "ops_lost",
    "link_share",
    "client_wait_ms",
    "writes_per_s_before",
    "writes_per_s_during",
)
"""What is given for each arm; the ops are of both VMs together, per second."""


class Machine(msgspec.Struct, kw_only=True):
    """Where the session ran."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    qemu: str
    accelerator: str


class Settings(msgspec.Struct, kw_only=True):
    """What was asked for; the same for every arm."""

    shape: str
    memory: str
    writes_per_s: int
    working_set_mib: int
    churn_mib: int
    connections: int
    window_s: float
    limit_s: dict[str, float]


class Arm(msgspec.Struct, kw_only=True):
    """An arm's figures: the medians by name, least and most in ``spread``."""

    arm: str
    churned: bool
    runs: int
    converged: int
    verified: bool
    notes: list[str]
    time_to_resume_s: float | None = None
    blackout_ms: float | None = None
    longest_gap_ms: float | None = None
    total_s: float | None = None
    bytes: float | None = None
    remote_faults: float | None = None
    fault_p50_us: float | None = None
    fault_p99_us: float | None = None
    ops_before: float | None = None
    ops_during: float | None = None
    ops_after: float | None = None
    ops_lost: float | None = None
    link_share: float | None = None
    client_wait_ms: float | None = None
    writes_per_s_before: float | None = None
    writes_per_s_during: float | None = None
    spread: dict[str, Spread] = {}

    @property
    def name(self) -> str:
        """The arm's name, and the guest's state where it is not the usual one."""
        return self.arm if self.churned else f"{self.arm} (unchurned)"


class Document(msgspec.Struct, kw_only=True):
    """A session."""

    schema: str = SCHEMA
    made_at: str
    machine: Machine
    settings: Settings
    arms: list[Arm]
    runs: list[Run]

    def runs_of(self, arm: Arm) -> list[Run]:
        """The runs that an arm's figures stand for."""
        return [run for run in self.runs if run.name == arm.name]


def _figure(run: Run, name: str) -> float | None:
    if name.startswith("ops_") and name != "ops_lost":
        rates: dict[str, float] | None = getattr(run, name)
        return None if rates is None else sum(rates.values())
    source = run if hasattr(run, name) else run.outcome
    value: float | None = getattr(source, name)
    return value


def summarise(runs: list[Run]) -> list[Arm]:
    """Each arm's figures, in the order in which the arms first ran."""
    arms = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        spreads = {figure: Spread.of(_figure(run, figure) for run in own) for figure in FIGURES}
        known = {figure: spread for figure, spread in spreads.items() if spread is not None}
        arms.append(
            Arm(
                arm=own[0].arm,
                churned=own[0].churned,
                runs=len(own),
                converged=sum(run.outcome.converged for run in own),
                verified=all(run.verified for run in own),
                notes=list(dict.fromkeys(run.outcome.note for run in own if run.outcome.note)),
                spread=known,
                **{figure: spread.median for figure, spread in known.items()},
            )
        )
    return arms


def save(document: Document, path: Path) -> None:
    """Write the document as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))


def load(path: Path) -> Document:
    """Read a document back.

    :raise msgspec.ValidationError: the file is not one.
    """
    return msgspec.json.decode(path.read_bytes(), type=Document)
