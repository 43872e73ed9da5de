"""What the benches of packing and of streams make of summaries."""

from __future__ import annotations

from typing import Any

import pytest

from bench import content, streams
from demo.figures import Outcome
from demo.hosts import TestbedError


def outcome(seconds: float, **summary: Any) -> Outcome:
    return Outcome(command_at=0.0, converged=True, total_s=seconds, summary=summary or None)


def test_packing_is_judged_by_medians_against_none() -> None:
    seconds = {"outboard-auto": (2.0, 1.8, 9.0), "outboard-none": (4.2, 4.0, 4.1)}
    played = [
        content.Played(content=kind, arm=arm, outcome=outcome(each))
        for kind in ("text", "noise")
        for arm, times in seconds.items()
        for each in times
    ]
    claims = content.claims_of(played)
    text = next(each for each in claims if "text" in each.name and each.against == "outboard-none")
    assert (text.met, text.ours, text.spread) == (True, 2.0, (1.8, 9.0))
    assert text.ratio == pytest.approx(2 / 4.1)
    assert not any(each.met for each in claims if "programs" in each.name or "qemu" in each.against)
    noise = next(each for each in claims if "noise" in each.name)
    assert (noise.bar, noise.met) == (1.03, True)


def test_rates_are_of_what_pages_hold() -> None:
    ours = outcome(3, rounds=[{"sent_pages": 2000, "seconds": 2.0}], data_pages=500, zero_pages=500)
    assert streams.rate_of(ours) == 500 * 4096
    ram = {"normal-bytes": 10_000_000}
    assert streams.rate_of(outcome(3, ram=ram, **{"total-time": 2100, "setup-time": 100})) == 5_000_000
    with pytest.raises(TestbedError, match="no summary"):
        streams.rate_of(outcome(3))


def test_streams_are_judged_against_qemu_and_one() -> None:
    rates = {"outboard-4": 900e6, "outboard-1": 700e6, "qemu-multifd-4-tls": 400e6, "qemu-multifd-2-tls": 500e6}
    played = [
        streams.Played(arm=arm, rate=rate, total_s=1.0, outcome=outcome(1.0))
        for arm, rate in rates.items()
        for _ in "123"
    ]
    met = {each.against: each.met for each in streams.claims_of(played)}
    assert met == {"qemu-multifd-4-tls": True, "qemu-multifd-2-tls": False, "outboard-1": True}
    assert streams.cipher_limit() > 1e6
