"""What is made of the outcomes of a host of two nodes."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import numa_vm
from bench.numa import claims_of, svg
from bench.numa_inside import BALANCING, MIGRATE, TO_AND_FRO, VM, Outcome, _ranks


def outcome(arm: str, every: float, pages: int, longest: float = 0.01) -> Outcome:
    """Ten batches, after each of which a tenth more is local."""
    local = [(number + 1) / 10 for number in range(10)] if arm not in (MIGRATE, BALANCING) else []
    at = [every * (number + 1) for number in range(10)]
    batches = [(one, pages, longest) for one in at]
    return Outcome(arm, at, [(n + 1) / 10 for n in range(10)], [pages] * 10, batches, local, 0.002, 1.0, 1.0, 0)


def arms(hottest: float, address: float) -> list[Outcome]:
    return [
        outcome("hottest-first", hottest, 100),
        outcome("address", address, 400),
        outcome(MIGRATE, address, 4000),
        outcome(BALANCING, 9.0, 4000),
        outcome(TO_AND_FRO, 1.0, 10),
        Outcome(VM, [1.0, 2.0], [1.0, 0.995], [7, 7], [(1.0, 100, 0.01)] * 2, [], 0.0, 0.0, 0.0, 0),
    ]


def test_claims_are_ratios_of_medians() -> None:
    claims = claims_of([arms(1.0, 4.0), arms(1.5, 4.0), arms(2.0, 4.0)], 2)
    times = [one for one in claims if one.name == "time until 90 % is local"]
    assert [one.against for one in times] == ["address", MIGRATE, BALANCING]
    assert times[0].ours == 9 * 1.5
    assert times[0].ratio == 1.5 / 4
    assert all(one.met for one in claims)
    assert not all(one.met for one in claims_of([arms(2.0, 4.0)], 2))


def test_what_never_comes_there_is_missed_and_a_wrong_word_counts() -> None:
    bad = arms(1.0, 4.0)
    bad[0].local = [0.5] * 10
    bad[1].wrong = 1
    bad[0].batches[3] = (4.0, 100, 0.5)
    missed = {one.name for one in claims_of([bad], 2) if not one.met}
    assert missed == {"time until 90 % is local", "pages until 90 % is local", "longest batch", "wrong words"}
    stalled = arms(1.0, 4.0)
    stalled[0].gap = 0.021
    assert [one.name for one in claims_of([stalled], 2) if not one.met] == ["longest wait of the target"]
    left = arms(1.0, 4.0)
    left[-1].sampled[1], left[-1].migrated = 0.9, [0, 0]
    assert [one.name for one in claims_of([left], 3) if not one.met] == [
        "moves of a VM's memory",
        "part of it that came each time",
        "the VM's passes over it meanwhile",
    ]
    never = arms(1.0, 4.0)
    never[3].sampled = [0.1] * 10
    assert all(one.met for one in claims_of([never], 2)), "whatever arrives beats what never does"


def test_the_picture_has_a_line_for_each_arm() -> None:
    drawn = ElementTree.fromstring(svg(arms(1.0, 4.0)))
    lines = drawn.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4


def test_ranks_of_equal_values_are_equal() -> None:
    assert np.argsort(_ranks(np.array([3.0, 1.0, 2.0]))).tolist() == [1, 2, 0]
    assert len(set(_ranks(np.array([5.0, 5.0, 5.0])).tolist())) == 1


def test_passes_of_the_vm_are_counted_from_what_its_console_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(numa_vm, "_CONSOLE", tmp_path / "console")
    monkeypatch.setattr(numa_vm, "_BOOT_S", 0.0)
    with numa_vm._Verifier(["sleep", "60"]) as vm:
        assert vm.told() == (0, 0)
        with pytest.raises(SystemExit, match="has not verified its memory"):
            vm.wait(1)
        numa_vm._CONSOLE.write_text("booting\nok 6144\nok 6144\nbad 2 first=7 checksum\nok 61")
        assert vm.told() == (3, 1), "the first line tells of the start"
        vm.wait(3)
