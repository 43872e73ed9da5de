"""What ``outboard migrate -o ndjson`` prints, as the demo reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.hosts import TestbedError
from demo.outboard_arms import last_line

PROGRESS = '{"schema":"outboard.migration.progress.v1","fraction":0.5}'
SUMMARY = '{"schema":"outboard.migration.summary.v1","state":"completed"}'


def test_the_summary_is_the_last_object(tmp_path: Path) -> None:
    log = tmp_path / "migrate.ndjson"
    log.write_text(f"{PROGRESS}\n{SUMMARY}\na warning\n")
    assert last_line(log)["state"] == "completed"


def test_no_summary_is_an_error_with_what_was_said(tmp_path: Path) -> None:
    log = tmp_path / "migrate.ndjson"
    log.write_text(f"{PROGRESS}\noutboard: the agent is gone\n")
    with pytest.raises(TestbedError, match="the agent is gone"):
        last_line(log)
