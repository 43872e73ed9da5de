"""What script/bootstrap installs is what pyproject.toml asks for, and the same on every machine."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
PINS = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^ ]+)", LOCK, re.MULTILINE)}


def asked_for() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


@pytest.mark.parametrize("line", asked_for())
def test_lock_has_what_the_project_asks_for(line: str) -> None:
    requirement = Requirement(line)
    pinned = PINS.get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{line} is not in requirements.lock: run script/lock"
    assert requirement.specifier.contains(pinned), f"requirements.lock has {pinned}, not {line}: run script/lock"


def test_lock_has_a_hash_for_each_package_and_names_no_place() -> None:
    entries = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) == len(PINS)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|^--|@ ", LOCK, re.MULTILINE)
