"""A migration in words."""

from __future__ import annotations

import msgspec

from outboard.migrate.explain import explain
from outboard.migrate.method import Goal
from outboard.migrate.report import Round, Slowed, Summary
from outboard.migrate.states import State, Where
from tests.agent.test_history import summary as summary_of


def summary() -> Summary:
    return summary_of("0123", "web", 1.0)


def told(one: Summary) -> str:
    return "\n".join(explain(one))


def rounds(*left: int) -> list[Round]:
    return [Round(sent_pages=1000, seconds=0.5, dirty_pages=pages) for pages in left]


def test_each_round_and_each_step_is_told() -> None:
    steps = [
        Slowed(2.0, 0.1, "vCPU 0", "900 pages are left at 100 pages/s: rounds end in 1.0 s, by themselves never"),
        Slowed(3.5, 1.0, "vCPU 0", "the rounds are over"),
    ]
    words = told(msgspec.structs.replace(summary(), rounds=rounds(900, 12), throttle=steps))
    assert "Round 1: 1000 pages in 0.50 s (8 MB/s); meanwhile the guest wrote to 900" in words
    assert "From 2.0 s on vCPU 0 had 10% of its processor time: 900 pages are left" in words
    assert "At 3.5 s vCPU 0 ran freely again" in words
    assert "It converged: after 2 rounds 12 pages were left" in words


def test_why_one_did_not_converge() -> None:
    failed = msgspec.structs.replace(
        summary(),
        rounds=rounds(1000, 1100),
        state=State.CANCELLED,
        safe_at=Where.SOURCE,
        error="cancelled",
        throttle=[Slowed(2.0, 1.0, "", "the writers cannot be held back: no cpu controller")],
    )
    words = told(failed)
    assert "It ended because: cancelled." in words
    assert "At 2.0 s: the writers cannot be held back" in words
    assert "did not converge" in words
    assert "--max-downtime" in words
    assert "had not converged yet" in told(msgspec.structs.replace(failed, rounds=rounds(10)))


def test_rounds_that_were_cut_short_did_not_converge() -> None:
    words = told(msgspec.structs.replace(summary(), rounds=rounds(900, 800), cut_short="the user had it switch over"))
    assert "It did not converge, but was cut short: the user had it switch over, with 800 pages left." in words
    assert "It converged" not in words


def test_the_goal_is_named() -> None:
    assert "Its goal was" not in told(summary())
    assert "Its goal was downtime: each page goes once" in told(msgspec.structs.replace(summary(), goal=Goal.DOWNTIME))


def test_the_waits_of_devices_are_told_apart() -> None:
    waited = msgspec.structs.replace(
        summary(), remote_faults=9, loading_faults=3, device_faults=2, queue_faults=1, queues="4 queues of 2 devices"
    )
    assert "for 3 of these pages in the pause and for 2 after it, 1 of them of its devices' queues" in told(waited)
