"""The history: the summary of every migration that began on this host, kept in SQLite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from outboard.migrate.report import Summary

_SCHEMA = """
CREATE TABLE IF NOT EXISTS migrations (
    migration TEXT PRIMARY KEY,
    vm TEXT NOT NULL,
    started REAL NOT NULL,
    summary TEXT NOT NULL
)
"""


class History:
    """Summaries in ``path``; the file is made when there is something to keep.

    Synchronization: SQLite's; any number of processes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, summary: Summary) -> None:
        """Add one summary."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path)) as base, base:
            base.execute(_SCHEMA)
            row = (summary.migration, summary.vm, summary.started, msgspec.json.encode(summary).decode())
            base.execute("INSERT OR REPLACE INTO migrations VALUES (?, ?, ?, ?)", row)

    def read(self, vm: str | None = None, last: int = 20) -> list[Summary]:
        """The newest ``last`` summaries, of one VM or of all, newest first."""
        if not self._path.exists():
            return []
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as base:
            rows = base.execute(
                "SELECT summary FROM migrations WHERE ?1 IS NULL OR vm = ?1 ORDER BY started DESC LIMIT ?2", (vm, last)
            ).fetchall()
        return [msgspec.json.decode(row[0], type=Summary) for row in rows]

    def find(self, name: str) -> Summary | None:
        """A migration by its id, or the latest one of the VM of that name."""
        if not self._path.exists():
            return None
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as base:
            row = base.execute(
                "SELECT summary FROM migrations WHERE migration = ?1 OR vm = ?1 "
                "ORDER BY migration = ?1 DESC, started DESC LIMIT 1",
                (name,),
            ).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Summary)

    def throttle_gain(self, vm: str) -> float:
        """How much more than the model says a VM writes when held back, by its last migration that did that."""
        return next((one.throttle_gain for one in self.read(vm) if any(step.share < 1 for step in one.throttle)), 1.0)
