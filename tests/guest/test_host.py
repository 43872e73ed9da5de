"""How a host of several nodes is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest import host as builder
from guest.build import BuildError, Image
from guest.host import command, run


def test_each_node_has_a_processor_and_memory_and_all_distances() -> None:
    words = command(Image(Path("k"), Path("i")), Path("/p"), Path("/r"), Path("/c"), [512, 256, 128])
    assert words[words.index("-smp") + 1] == "3,sockets=3"
    assert words[words.index("-m") + 1] == "896M"
    assert [word for word in words if word.startswith("node,")] == [
        f"node,nodeid={node},memdev=m{node},cpus={node}" for node in range(3)
    ]
    assert [word for word in words if word.startswith("dist,")] == [
        "dist,src=1,dst=0,val=21",
        "dist,src=2,dst=0,val=21",
        "dist,src=2,dst=1,val=21",
    ]
    assert words[words.index("-append") + 1].endswith(" outboard.run=/p")


def test_a_qemu_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "command", lambda *_: ["sh", "-c", "echo no kernel >&2; exit 3"])
    with pytest.raises(BuildError, match="QEMU exited with 3: no kernel"):
        run(Image(Path("k"), Path("i")), Path("/p"), Path("/r"), Path("/c"), [512, 256], 30)


def test_an_image_is_made_of_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(_output: Path, into: Path) -> None:
        made.append(into)

    monkeypatch.setattr(builder, "_make", make)
    assert builder.build(tmp_path) == builder.build(tmp_path)
    assert len(made) == 1
    assert {"busybox-static", "linux-image-amd64"} == set(builder._PACKAGES)
