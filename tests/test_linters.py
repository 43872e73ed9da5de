"""The linters as ordinary tests, for whoever calls pytest and not script/test."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["mypy", "ruff", "format", "layers"])
def test_linter_has_nothing_to_say(name: str) -> None:
    done = subprocess.run([ROOT / "script/lint", name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
