"""Which cases are measured, and what their growth is said to be."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from bench.scale import GIB, SPARSE_DATA, Case, Row, cases, growth, show

ROW = Row("size", "post-copy", 1024, 256, 1, 1, 2.0, 1.0, 30.0, 270.0, 135.0, 20.0, None, 120.0, 130.0, 90.0)


def test_each_case_is_asked_for() -> None:
    made = cases((0.5, 2), (64,), (4,), 8, 0.25)
    assert made == [
        Case("size", GIB // 2, GIB // 8),
        Case("size", 2 * GIB, GIB // 2),
        Case("sparse", 64 * GIB, SPARSE_DATA),
        Case("vcpus", GIB, GIB // 4, vcpus=4),
        Case("at once", GIB // 2, GIB // 8, at_once=8),
    ]
    assert cases((), (), (), 0, 0.25) == []


def test_growth_is_a_line_through_the_sizes_alone() -> None:
    rows = [
        msgspec.structs.replace(ROW, memory_mib=1024 * size, total_s=1.0 + 2 * size, source_mib=100.0 + 3 * size)
        for size in (1, 2, 4)
    ]
    other = msgspec.structs.replace(ROW, case="sparse", memory_mib=1 << 19, total_s=9.0)
    assert growth([*rows, other], "total_s") == pytest.approx((1.0, 2.0))
    assert growth([*rows, other], "source_mib") == pytest.approx((100.0, 3.0))
    assert growth([rows[0], other], "total_s") is None
    said = io.StringIO()
    show([*rows, other], Console(file=said, width=220))
    assert "post-copy total_s: 1.00 s + 2.00 s a GiB of memory" in said.getvalue()
    assert "524,288 MiB" in said.getvalue()
