"""The lists of sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from outboard.errors import KernelError
from outboard.linux import nodes


def test_lists_are_read_and_damage_is_refused() -> None:
    assert nodes.numbers("0-2,8\n") == (0, 1, 2, 8)
    assert nodes.numbers("\n") == ()
    for text in ("3-1", "0-99999999999", "a"):
        with pytest.raises(ValueError, match=r"no range|invalid literal"):
            nodes.numbers(text)


def test_this_kernel_is_read() -> None:
    processors = nodes.processors()
    assert all(one.number in one.siblings for one in processors)
    for node in nodes.nodes():
        assert 0 <= node.free <= node.memory


def test_a_system_without_processors_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="cpu/online"):
        nodes.processors(tmp_path)
