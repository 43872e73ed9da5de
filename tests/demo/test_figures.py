"""The arithmetic of the report, on recordings made up so that the answers are known."""

from __future__ import annotations

import pytest

from demo.figures import LinkUse, Spread, ops_lost, rates, settle_losses
from tests.demo.recorded import COMMAND_AT, run, traffic


def test_rates_count_the_share_of_a_bucket_that_is_inside() -> None:
    seen = traffic([(1.0, 1000, 0), (1.0, 3000, 0)], 100.0)
    assert rates(seen, 100.5, 101.5) == {"web": pytest.approx(2000), "neighbour": 0}
    assert rates(seen, 100.95, 101.05)["web"] == pytest.approx(2000)


def test_nothing_is_lost_at_the_reference_rate() -> None:
    seen = traffic([(30.0, 1500, 500)], 0.0)
    assert ops_lost(seen, 5.0, 20.0, 20.0, 2000.0) == pytest.approx(0, abs=1e-6)


def test_lost_operations_are_the_area_below_the_reference() -> None:
    # 4 s at half the reference, then 1 s of silence, then the reference.
    seen = traffic([(4.0, 500, 500), (1.0, 0, 0), (15.0, 1500, 500)], 10.0)
    assert ops_lost(seen, 10.0, 20.0, 20.0, 2000.0) == pytest.approx(4 * 1000 + 2000)


def test_what_was_not_watched_is_not_lost() -> None:
    seen = traffic([(4.0, 500, 500), (6.0, 1500, 500)], 10.0)
    assert ops_lost(seen, 10.0, 10.0, 40.0, 2000.0) == pytest.approx(4000)


def test_an_arm_without_an_end_is_held_against_the_others() -> None:
    runs = [run("outboard-enlightened", 3.4, 0.4), run("qemu-pre-copy", None, None)]
    settle_losses(runs, 20.0)
    assert runs[0].reference == pytest.approx(5000)
    assert runs[1].reference is None
    assert runs[1].ops_lost == pytest.approx((5000 - 2000) * 20)
    # 0.4 s at 2000 and 3 s at 3500 of 5000 a second.
    assert runs[0].ops_lost == pytest.approx(0.4 * 3000 + 3.0 * 1500)


def test_link_use_between_samples() -> None:
    link = LinkUse(at_s=[0.0, 1.0, 2.0, 3.0], bytes=[0, 100, 300, 300])
    assert link.between(0.5, 1.5) == 150
    assert link.busiest(0.0, 3.0) == pytest.approx(200)
    assert link.busiest(0.0, 0.5) == pytest.approx(100)  # shorter than the span


def test_blackout_is_from_stop_to_resume() -> None:
    outcome = run("outboard-enlightened", 3.4, 0.4).outcome
    assert outcome.command_at == COMMAND_AT
    assert outcome.blackout_ms == pytest.approx(20)
    outcome.time_to_resume_s = None
    assert outcome.blackout_ms is None


def test_spread_leaves_out_what_is_not_known() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of([None]) is None
