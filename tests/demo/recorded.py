"""A session as it would have been recorded, made up: what the report's tests are drawn from."""

from __future__ import annotations

from demo.document import Document, Machine, Settings, summarise
from demo.figures import BEFORE_S, LinkUse, Outcome, Run, rates, settle_losses
from demo.load import Traffic

COMMAND_AT = 1000.0


def traffic(seconds: list[tuple[float, float, float]], begin_s: float) -> Traffic:
    """Constant rates in a row: (how long, web's answers a second, neighbour's), from *begin_s* on."""
    web: list[int] = []
    neighbour: list[int] = []
    for duration, of_web, of_neighbour in seconds:
        web += [round(of_web / 10)] * round(duration * 10)
        neighbour += [round(of_neighbour / 10)] * round(duration * 10)
    return Traffic(
        origin_s=begin_s,
        bucket_s=0.1,
        ops={"web": web, "neighbour": neighbour},
        longest_wait_ms={"web": [3.0] * len(web), "neighbour": [2.0] * len(web)},
        connections=8,
        broken=[],
        wrong=[],
        elapsed_s=len(web) / 10,
        cpu_s=len(web) / 100,
    )


def run(arm: str, total_s: float | None, resume_s: float | None, *, churned: bool = True) -> Run:
    """One run of an arm whose link was busy at 100 MB/s from the command to its end."""
    end = total_s or 20.0
    watched = end + 7.0
    busy = [
        (resume_s or end, 1000, 1000),
        (end - (resume_s or end), 1500, 2000),
        (7.0, 3000 if total_s else 1000, 2000),
    ]
    seen = traffic([(5.0, 1000, 1000), *busy], COMMAND_AT - 5.0)
    link = LinkUse(
        at_s=[COMMAND_AT - 5.0, COMMAND_AT, COMMAND_AT + end, COMMAND_AT + watched],
        bytes=[0, 0, int(end * 100e6), int(end * 100e6)],
    )
    outcome = Outcome(
        command_at=COMMAND_AT,
        watched_s=watched,
        converged=total_s is not None,
        time_to_stop_s=None if resume_s is None else resume_s - 0.02,
        time_to_resume_s=resume_s,
        total_s=total_s,
        given_up_s=end if total_s is None else None,
        remote_faults=None if resume_s is None else 1234,
        note="" if total_s else "did not converge in 20 s",
    )
    return Run(
        arm=arm,
        churned=churned,
        shape="1gbit",
        accelerator="TCG",
        outcome=outcome,
        traffic=seen,
        link=link,
        blackout_ms=outcome.blackout_ms,
        longest_gap_ms=None if resume_s is None else 44.0,
        bytes=link.between(COMMAND_AT, COMMAND_AT + end),
        link_share=link.busiest(COMMAND_AT, COMMAND_AT + end) / 125e6,
        writes_per_s_before=40000,
        writes_per_s_during=30000,
        ops_before=rates(seen, COMMAND_AT - BEFORE_S, COMMAND_AT),
        ops_during=rates(seen, COMMAND_AT, COMMAND_AT + end),
        ops_after=None if total_s is None else rates(seen, COMMAND_AT + end + 1, COMMAND_AT + end + 6),
        ops_lost=None,
        client_wait_ms=3.0,
        verified=True,
        checks=["the guest's own check: ok 65536"],
    )


def document(runs: list[Run]) -> Document:
    """A session of these runs."""
    settle_losses(runs, 20.0)
    return Document(
        made_at="2025-01-01 12:00 UTC",
        machine=Machine(cpu="a processor", cores=2, memory_gib=24, kernel="6.18", qemu="7.2", accelerator="tcg"),
        settings=Settings(
            shape="1gbit",
            memory="1GiB",
            writes_per_s=40000,
            working_set_mib=256,
            churn_mib=300,
            connections=4,
            window_s=20.0,
            limit_s={"qemu-pre-copy": 20.0},
        ),
        arms=summarise(runs),
        runs=runs,
    )
