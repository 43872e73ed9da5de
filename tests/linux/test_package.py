"""Machines that we know nothing of."""

from __future__ import annotations

import importlib
import platform
import sys

import pytest


def test_another_machine_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import outboard.linux

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ImportError, match="x86_64 only, and this machine is aarch64"):
        importlib.reload(outboard.linux)
    monkeypatch.undo()
    assert importlib.reload(outboard.linux) is sys.modules["outboard.linux"]
