"""A migration in words: why it did or did not converge, and what was tried."""

from __future__ import annotations

from outboard.migrate.goals import WHY
from outboard.migrate.method import Method
from outboard.migrate.report import Round, Slowed, Summary
from outboard.migrate.states import State
from outboard.pages import PAGE_SIZE

_MB = 1e6


def explain(summary: Summary) -> list[str]:
    """What happened, a sentence or two for each step, in the order of time."""
    words = [
        f"{summary.vm} from {summary.source} to {summary.destination}, {summary.method.value}: {summary.state.value} "
        f"after {summary.total_s:.1f} s; the VM is at the {summary.safe_at.value}."
    ]
    if summary.goal is not None:
        words.append(f"Its goal was {summary.goal.value}: {WHY[summary.goal]}.")
    if summary.error is not None:
        words.append(f"It ended because: {summary.error}.")
    if summary.method in (Method.POST_COPY, Method.ENLIGHTENED):
        words.append(
            "It converges whatever the guest writes: the VM resumes before its memory has gone, and each page goes "
            "once after that."
        )
        if summary.method is Method.ENLIGHTENED:
            words.append(f"Order and what was left out came from: {summary.hints}.")
    words += [_round(number, one) for number, one in enumerate(summary.rounds, 1)]
    words += [_step(step) for step in summary.throttle]
    if summary.rounds:
        words.append(_convergence(summary))
    if summary.blackout_ms is not None:
        words.append(f"The VM stood still for {summary.blackout_ms:.0f} ms.")
    if summary.remote_faults:
        p50, p99 = summary.fault_p50_us or 0, summary.fault_p99_us or 0
        words.append(
            f"At the destination it waited for {summary.remote_faults} pages, half of them for less than {p50:.0f} us, "
            f"99 of 100 for less than {p99:.0f} us."
        )
    if summary.loading_faults or summary.device_faults:
        words.append(
            f"QEMU's own threads waited for {summary.loading_faults or 0} of these pages in the pause and for "
            f"{summary.device_faults or 0} after it, {summary.queue_faults or 0} of them of its devices' queues "
            f"({summary.queues})."
        )
    return words


def _rate(pages: int, seconds: float) -> str:
    return f"{pages * PAGE_SIZE / seconds / _MB:.0f} MB/s" if seconds else "-"


def _round(number: int, one: Round) -> str:
    held = "" if one.share >= 1 else f", its writers held to {one.share:.0%},"
    return (
        f"Round {number}: {one.sent_pages} pages in {one.seconds:.2f} s ({_rate(one.sent_pages, one.seconds)}); "
        f"meanwhile the guest{held} wrote to {one.dirty_pages} ({_rate(one.dirty_pages, one.seconds)})."
    )


def _step(step: Slowed) -> str:
    if not step.who:
        return f"At {step.at:.1f} s: {step.why}."
    if step.share >= 1:
        return f"At {step.at:.1f} s {step.who} ran freely again: {step.why}."
    return f"From {step.at:.1f} s on {step.who} had {step.share:.0%} of its processor time: {step.why}."


def _convergence(summary: Summary) -> str:
    last = summary.rounds[-1]
    if summary.cut_short is not None:
        return f"It did not converge, but was cut short: {summary.cut_short}, with {last.dirty_pages} pages left."
    if summary.state in (State.COMPLETED, State.POSTCOPY, State.COMMITTED):
        return f"It converged: after {len(summary.rounds)} rounds {last.dirty_pages} pages were left for the pause."
    if last.sent_pages and last.dirty_pages >= last.sent_pages:
        return (
            "It did not converge: a round left as many pages as it sent. Allow a longer pause (--max-downtime), hold "
            "the guest back (--throttle), or resume early (--enlightened, --hybrid)."
        )
    return "It had not converged yet."
