"""The documentation builds without a warning, as a site and as man pages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(("builder", "page"), [("html", "migrate.html"), ("man", "outboard.1")])
def test_docs_build_without_a_warning(tmp_path: Path, builder: str, page: str) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", builder, "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, "docs", str(tmp_path / "out")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--max-downtime" in (tmp_path / "out" / page).read_text().replace("\\-", "-")
