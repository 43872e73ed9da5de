"""The image is built once, by whoever comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest import build as builder
from guest.build import BuildError, build


def test_what_is_built_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(_output: Path, into: Path) -> None:
        made.append(into)
        (into / "vmlinuz").touch()
        (into / "initrd.gz").touch()

    monkeypatch.setattr(builder, "_make", make)
    first = build(tmp_path)
    assert first == build(tmp_path)
    assert len(made) == 1
    assert first.kernel.exists()
    assert first.initrd.exists()
    monkeypatch.setattr(builder, "digest", lambda: "another")
    assert build(tmp_path).kernel == tmp_path / "another" / "vmlinuz"


def test_a_build_that_fails_leaves_nothing_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_output: Path, into: Path) -> None:
        (into / "vmlinuz").touch()
        builder.run("false")

    monkeypatch.setattr(builder, "_make", fail)
    with pytest.raises(BuildError, match="false exited with 1"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
