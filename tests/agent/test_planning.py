"""What is remembered of earlier migrations, as far as it tells of the next."""

from __future__ import annotations

from pathlib import Path

import msgspec

from outboard.agent.history import History
from outboard.agent.planning import past_of
from outboard.migrate.method import Method
from outboard.migrate.plan import Past
from outboard.migrate.report import Slowed
from outboard.migrate.states import State
from tests.agent.test_history import summary


def test_rates_are_the_hosts_and_pauses_the_vms(tmp_path: Path) -> None:
    history = History(tmp_path / "history.db")
    assert past_of(history, "web", "b") == Past()
    own = summary("1", "web", 1.0)
    early = msgspec.structs.replace(own, method=Method.ENLIGHTENED, verified=None, time_to_resume_s=0.7)
    kept = [
        own,  # verified: its pause was as long as the rest
        msgspec.structs.replace(early, migration="2", bulk_rate=100e6, blackout_ms=30.0),
        msgspec.structs.replace(early, migration="3", bulk_rate=90e6, blackout_ms=40.0, destination="c"),
        msgspec.structs.replace(early, migration="4", vm="db", bulk_rate=80e6, started=2.0),
        msgspec.structs.replace(early, migration="5", state=State.FAILED, bulk_rate=1.0, blackout_ms=9e9),
        msgspec.structs.replace(early, migration="6", method=Method.PRE_COPY, time_to_resume_s=60.0, blackout_ms=50.0),
        msgspec.structs.replace(
            early, migration="7", blackout_ms=20.0, throttle=[Slowed(1.0, 0.5, "vCPU 0", "")], throttle_gain=1.5
        ),
    ]
    for one in kept:
        history.keep(one)
    past = past_of(history, "web", "b")
    assert sorted(past.rates) == [80e6, 100e6]
    assert sorted(past.blackouts_ms) == [20.0, 30.0, 40.0, 50.0]
    assert past.resumes_s == [0.7, 0.7, 0.7]
    assert past.throttle_gain == 1.5
