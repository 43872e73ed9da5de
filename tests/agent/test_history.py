"""Summaries are kept and come back, the newest first."""

from pathlib import Path

from outboard.agent.history import History
from outboard.migrate.method import Method
from outboard.migrate.report import Round, Summary
from outboard.migrate.states import State, Where


def summary(migration: str, vm: str, started: float) -> Summary:
    return Summary(
        migration=migration,
        vm=vm,
        source="a",
        destination="b",
        method=Method.HYBRID,
        started=started,
        state=State.COMPLETED,
        safe_at=Where.DESTINATION,
        error=None,
        total_s=1.5,
        time_to_resume_s=1.0,
        blackout_ms=20.5,
        bytes=10,
        pages=4,
        data_pages=3,
        zero_pages=1,
        urgent_pages=0,
        never_sent_pages=0,
        resent_pages=0,
        hints="none",
        trace="pagemap",
        attach_ms=1.0,
        arm_ms=1.0,
        rounds=[Round(sent_pages=4, seconds=0.5, dirty_pages=0)],
        remote_faults=0,
        zero_faults=0,
        minor_faults=0,
        fault_p50_us=None,
        fault_p99_us=None,
        mapped_before_resume=4,
        bulk_rate=None,
        verified=True,
        exit_code=0,
    )


def test_nothing_yet(tmp_path: Path) -> None:
    assert History(tmp_path / "none" / "history.db").read() == []


def test_what_is_kept_comes_back_newest_first(tmp_path: Path) -> None:
    history = History(tmp_path / "state" / "history.db")
    made = [summary("1", "web", 1.0), summary("2", "db", 2.0), summary("3", "web", 3.0)]
    for one in made:
        history.keep(one)
    assert history.read() == made[::-1]
    assert history.read("web") == [made[2], made[0]]
    assert history.read(last=1) == [made[2]]
    history.keep(made[0])
    assert len(history.read()) == 3
